"""The rules of the memory machine by which tables come to share blocks: forks, first writes, merges."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
import pytest

from memsvc.core.pool import BlockState
from quire.errors import InvalidRequestError, StaleEpochError
from quire.memory import ForkRequest
from tests.properties.memory_model import POOL, SIZE, ModelGateway, ModelTable

if TYPE_CHECKING:
    from memsvc.core.memory import MemoryCore


class SharingRules(RuleBasedStateMachine):
    """A part of `MemoryMachine`, which has the state."""

    core: MemoryCore
    pool: Any
    gateways: list[ModelGateway]
    epoch: int
    now: float
    choose: Any
    read: Any
    tell: Any
    release: Any
    check_readable: Any
    WINDOW: ClassVar[int] = 0
    """Positions that a query reads; 0 for all."""

    def own_open_block(self, gateway: ModelGateway, table: ModelTable) -> list[int] | None:
        """Has a table name a block that it may write into: returns what to tell, or None if no block is leased."""
        index = table.written // SIZE
        if table.written % SIZE == 0:
            return []
        if not self.is_shared(gateway, table):
            return []
        if not gateway.leased:
            return None
        old, table.blocks[index] = table.blocks[index], gateway.leased.pop(0)
        table.copies.append((old, table.blocks[index]))
        table.must_copy = False
        return [table.number, index, table.blocks[index]]

    @staticmethod
    def is_shared(gateway: ModelGateway, table: ModelTable) -> bool:
        """Whether a table may not write into its open block."""
        others = [other for other in gateway.tables.values() if other is not table]
        return table.must_copy or any(table.blocks[table.written // SIZE] in other.blocks for other in others)

    @rule(which=st.integers(0, 1), data=st.data(), count=st.integers(1, 3))
    def fork(self, which: int, data: st.DataObject, count: int) -> None:
        """Opens tables that share the beginning of another; no block is taken for it."""
        chosen = self.choose(data, which)
        if chosen is not None:
            limit = self.fork_limit(chosen[1])
            self.fork_of(*chosen, count, data.draw(st.integers(min(1, limit), limit)))

    @staticmethod
    def fork_limit(source: ModelTable) -> int:
        """Returns how many tokens of a table can be shared."""
        return source.written - (source.written % SIZE if source.copies else 0)

    def fork_of(self, gateway: ModelGateway, source: ModelTable, count: int, at_token: int) -> None:
        """Forks a table; refused where nothing is written."""
        limit = self.fork_limit(source)
        if self.WINDOW and any(
            not source.blocks[position // SIZE] for position in range(max(0, at_token - self.WINDOW + 1), at_token)
        ):
            # The next token would read what was released.
            request = ForkRequest(POOL, self.epoch, source.number, count, at_token)
            with pytest.raises(InvalidRequestError):
                self.core.fork(gateway.number, request, self.now)
            return
        available, used = self.pool.available_block_count, self.pool.count(BlockState.USED)
        if limit == 0:
            with pytest.raises(InvalidRequestError):
                self.core.fork(gateway.number, ForkRequest(POOL, self.epoch, source.number, count), self.now)
            return
        request = ForkRequest(POOL, self.epoch, source.number, count, 0 if at_token == limit else at_token)
        forked = self.core.fork(gateway.number, request, self.now)
        assert (self.pool.available_block_count, self.pool.count(BlockState.USED)) == (available, used)
        assert (forked.token_count, len(forked.tables)) == (at_token, count)
        blocks = source.blocks[: -(-at_token // SIZE)]
        blocks = [source.offered.get(index, block) for index, block in enumerate(blocks)]
        if at_token % SIZE:
            blocks[-1] = source.blocks[len(blocks) - 1]
        seen = dataclasses.replace(source, blocks=blocks, confirmed=0, offered={})
        self.release(seen, at_token)
        assert forked.block_ids == seen.blocks
        for number in forked.tables:
            child = dataclasses.replace(
                source,
                number=number,
                tokens=source.tokens[:at_token],
                contents=source.contents[:at_token],
                written=at_token,
                blocks=list(blocks),
                copies=[],
                must_copy=forked.must_copy,
                offered={},
                confirmed=at_token,
            )
            gateway.tables[number] = child
            self.check_readable(child, at_token)

    @rule(which=st.integers(0, 1), data=st.data())
    def write_into_what_others_hold(self, which: int, data: st.DataObject) -> None:
        """Confirms a write into a shared block: refused, and nothing has changed."""
        chosen = self.choose(data, which)
        if chosen is None:
            return
        gateway, table = chosen
        if table.written % SIZE == 0 or not self.is_shared(gateway, table):
            return
        with pytest.raises(StaleEpochError):
            self.tell(
                gateway,
                tables=[table.number],
                token_starts=[len(table.tokens)],
                token_counts=[1],
                token_ids=[1],
                written_counts=[table.written + 1],
            )

    @rule(which=st.integers(0, 1), data=st.data())
    def merge(self, which: int, data: st.DataObject) -> None:
        """Has a table name a block that was offered to it; what it reads is the same."""
        gateway = self.gateways[which]
        offers = [(table, index) for table in gateway.tables.values() for index in table.offered]
        if not offers:
            return
        self.take_up(gateway, *data.draw(st.sampled_from(offers)))

    def take_up(self, gateway: ModelGateway, table: ModelTable, index: int) -> None:
        """Has a table name the block that was offered for one of its entries."""
        table.blocks[index] = table.offered.pop(index)
        self.tell(gateway, replaced=[table.number, index, table.blocks[index]])

    @staticmethod
    def named(table: ModelTable) -> set[int]:
        """Returns the blocks that may not go while a table is open."""
        return {*table.blocks, *(source for source, _ in table.copies), *table.offered.values()} - {0}
