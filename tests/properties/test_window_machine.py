"""The machine of random commands in a pool whose models attend over a sliding window."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule
import pytest

from tests.properties.test_memory_machine import SIZE, MemoryMachine


class WindowMachine(MemoryMachine):
    """The same in a pool whose queries read the last 20 positions."""

    WINDOW = 20

    @rule(which=st.integers(0, 1), data=st.data(), count=st.integers(8, 40))
    def slide(self, which: int, data: st.DataObject, count: int) -> None:
        """Writes tokens one by one, with a block from the pool for each that needs one."""
        chosen = self.choose(data, which)
        if chosen is None:
            return
        gateway, table = chosen
        for _ in range(count):
            index = table.written // SIZE
            if index == len(table.blocks):
                if not gateway.leased:
                    self.lease(which=which, count=1)
                if not gateway.leased:
                    return
                table.blocks.append(gateway.leased.pop(0))
                self.tell(gateway, appended=[table.number, index, table.blocks[index]])
            replaced = self.own_open_block(gateway, table)
            if replaced is None:
                return
            start = len(table.tokens)
            if table.written == start:
                if start == 10 * SIZE:
                    return
                table.tokens.append(9000 + start % 7)
                table.contents.append(9000 + start % 7)
            self.store(table, table.written, table.written + 1)
            table.written += 1
            self.tell(
                gateway, tables=[table.number], token_starts=[start], token_counts=[len(table.tokens) - start],
                token_ids=table.tokens[start:], written_counts=[table.written], replaced=replaced,
            )  # fmt: skip
            self.release(table, table.written)
            self.holds()


WindowMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.row(43, 54, 55)
@pytest.mark.invariant(1, 2, 3, 4, 5, 6, 14)
class TestWindowMachine(WindowMachine.TestCase):  # type: ignore[misc,name-defined]
    """Runs the machine: a failure here is a block that is read after it was given away, or never given back."""
