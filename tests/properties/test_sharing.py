"""The memory core under forks, first writes and merges, compared with a slow model of what each table reads.

Uses the model of `test_memory_machine.py`, driven by seeds with weights of their own: what is interesting needs several
tables that share a block at the same time, which commands drawn evenly bring about too rarely.
"""

from __future__ import annotations

from collections.abc import Callable
import random

import pytest

from quire.memory import CloseReason
from tests.properties.memory_model import SIZE, ModelTable
from tests.properties.test_memory_machine import MemoryMachine

STEPS = 70
PIECES = [(0, 16), (0, 16), (0, 16), (0, 19), (1, 8), (3, 19)]


class SharingWalk:
    """A random walk of two gateways whose tables fork and merge all the time."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.machine = MemoryMachine()
        self.machine.start()
        self.was_shared: set[int] = set()
        self.seen = {"forks": 0, "copies": 0, "in_place": 0, "merges": 0}
        self.actions: list[tuple[Callable[[int], None], float]] = [
            (self.open, 1.5),
            (self.fork, 1.5),
            (self.step, 3.0),
            (self.close, 1.2),
            (self.merge, 1.0),
            (self.lease, 1.0),
            (self.tell_early, 0.7),
        ]

    def run(self) -> None:
        """Takes all steps; the machine checks after each."""
        actions, weights = zip(*self.actions, strict=True)
        for _ in range(STEPS):
            which = int(self.random.random() < 0.2)
            self.random.choices(actions, weights)[0](which)
            self.machine.holds()

    def tables(self, which: int) -> list[ModelTable]:
        """Returns the open tables of a gateway, in random order."""
        found = list(self.machine.gateways[which].tables.values())
        self.random.shuffle(found)
        return found

    def open(self, which: int) -> None:
        """Opens a table and has some of it written."""
        machine, gateway = self.machine, self.machine.gateways[which]
        before = set(gateway.tables)
        pieces = [self.random.choice(PIECES) for _ in range(self.random.randrange(1, 3))]
        machine.admit(which, pieces, "", read=self.random.random() < 0.4, write=self.random.random() < 0.9)
        for number in set(gateway.tables) - before:
            table = gateway.tables[number]
            written = self.random.randint(table.written, len(table.tokens))
            if written > table.written:
                machine.confirm(gateway, table, written)

    def fork(self, which: int) -> None:
        """Forks a table, at its end or anywhere."""
        for table in self.tables(which)[:1]:
            limit = self.machine.fork_limit(table)
            at_token = limit if self.random.random() < 0.6 else self.random.randint(min(1, limit), limit)
            self.machine.fork_of(self.machine.gateways[which], table, self.random.randint(1, 3), at_token)
            self.seen["forks"] += 1
            self.was_shared.update(table.blocks[at_token // SIZE : at_token // SIZE + 1])

    def step(self, which: int) -> None:
        """Has tables write one token each, as far as there are blocks: all in one journal."""
        machine, gateway = self.machine, self.machine.gateways[which]
        fields: dict[str, list[int]] = {"replaced": [], "tables": [], "token_starts": [], "token_counts": []}
        fields |= {"token_ids": [], "written_counts": []}
        for table in self.tables(which):
            if table.written >= len(table.blocks) * SIZE or len(table.tokens) >= 10 * SIZE:
                continue
            shared = table.written % SIZE and self.machine.is_shared(gateway, table)
            replaced = machine.own_open_block(gateway, table)
            if replaced is None:
                continue
            self.seen["copies"] += bool(replaced)
            alone = table.written % SIZE and not shared
            self.seen["in_place"] += bool(alone and table.blocks[table.written // SIZE] in self.was_shared)
            start = len(table.tokens)
            if table.written == start:
                table.tokens.append(7000 + table.number % 3)
                table.contents.append(table.tokens[-1])
            machine.store(table, table.written, table.written + 1)
            table.written += 1
            fields["replaced"] += replaced
            fields["tables"].append(table.number)
            fields["token_starts"].append(start)
            fields["token_counts"].append(len(table.tokens) - start)
            fields["token_ids"] += table.tokens[start:]
            fields["written_counts"].append(table.written)
        machine.tell(gateway, **fields)

    def close(self, which: int) -> None:
        """Closes a table."""
        gateway = self.machine.gateways[which]
        for table in self.tables(which)[:1]:
            self.machine.tell(gateway, closed=[table.number], close_reasons=[self.random.choice(list(CloseReason))])
            del gateway.tables[table.number]

    def merge(self, which: int) -> None:
        """Has tables name what was offered to them."""
        for table in self.tables(which):
            for index in sorted(table.offered)[:1]:
                self.machine.take_up(self.machine.gateways[which], table, index)
                self.seen["merges"] += 1

    def lease(self, which: int) -> None:
        """Leases a few blocks."""
        self.machine.lease(which, self.random.randint(1, 3))

    def tell_early(self, which: int) -> None:
        """Tells tokens before they are written, with blocks for them."""
        for table in self.tables(which)[:1]:
            self.machine.extend_by(self.machine.gateways[which], table, self.random.randint(1, 20))


@pytest.mark.row(56, 67, 68, 73)
@pytest.mark.invariant(1, 2, 3, 4)
def test_tables_that_fork_and_merge_read_what_is_theirs() -> None:
    """A failure is a sample that reads another's text, a block that leaks, or one that is free while it is read."""
    seen = {"forks": 0, "copies": 0, "in_place": 0, "merges": 0}
    for seed in range(40):
        walk = SharingWalk(seed)
        walk.run()
        seen = {name: count + walk.seen[name] for name, count in seen.items()}
    assert min(seen.values()) >= 10, seen
