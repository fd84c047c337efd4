"""A small cluster without a network: the memory core, gateways, and a device that remembers what its blocks hold."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import itertools
from typing import Any

import numpy as np

from memsvc.core import invariants, views
from memsvc.core.lease import FenceRequired, LeaseRecalled, MergeOffered
from memsvc.core.memory import MemoryCore
from memsvc.core.pool import BlockPool, BlockState
from memsvc.core.validation import PoolRegistration
from memsvc.local import packed
from quire.columns import pack
from quire.errors import QuireError
from quire.memory import AdmitRequest, CloseReason, ForkRequest, JournalEntry, PoolSpec

POOL = "pool"
SIZE = 16
USABLE = 16


def prompt(length: int, seed: int = 0) -> list[int]:
    """Returns `length` tokens; different seeds have none in common."""
    return [seed * 1_000_000 + position for position in range(length)]


def refused(kind: type[QuireError], call: Any, *arguments: Any, **fields: Any) -> QuireError:
    """Returns the error with which `call` is refused; fails if it is not."""
    try:
        call(*arguments, **fields)
    except kind as error:
        return error
    raise AssertionError(f"it was not refused with {kind.__name__}")


@dataclasses.dataclass
class Held:
    """A sequence as its gateway knows it."""

    gateway: int
    table: int
    tokens: list[int]
    blocks: list[int]
    cached: int
    copies: list[tuple[int, int]]
    written: int
    tenant: str


class World:
    """One pool, any number of gateways. Every command is followed by a check of all invariants.

    Args:
        usable: blocks that can be granted.
        window: positions that a query reads, 0 for all.
        chain: computes identities; another one only where digests collide.
    """

    def __init__(self, usable: int = USABLE, *, window: int = 0, **core_fields: Any) -> None:
        self.core = MemoryCore(b"secret of this test", lease_ttl=3.0, **core_fields)
        self.spec = PoolSpec(usable + 1, SIZE, 1, "model", "float32", 64 * SIZE, window)
        self.now = 0.0
        self.epoch = 0
        self.device: dict[int, list[int | None]] = {}
        self._names = itertools.count(1)
        self._leased: dict[int, int] = {}
        self.register(1)
        self.gateway = self.connect("one")

    # Who is there

    def register(self, incarnation: int) -> None:
        """Registers an incarnation of the executor; a new one holds nothing."""
        registration = PoolRegistration(POOL, incarnation, "h:1", self.spec)
        self.epoch = self.core.register_pool(registration, self.epoch + 10, self.now)
        self.check()

    def connect(self, name: str) -> int:
        """Connects a gateway."""
        number = self.core.connect_gateway(name, next(self._names), self.now)
        self.check()
        return number

    @property
    def pool(self) -> BlockPool:
        """The blocks."""
        return self.core.pool(POOL).memory.pool

    def count(self, state: BlockState) -> int:
        """Returns how many blocks are in a state."""
        return self.pool.count(state)

    def fences(self) -> list[FenceRequired]:
        """Returns the fences that are asked for."""
        return [event for event in self.core.take_events() if isinstance(event, FenceRequired)]

    def fence(self) -> FenceRequired:
        """Returns the only fence that is asked for."""
        fences = self.fences()
        assert len(fences) == 1, fences
        return fences[0]

    def recalled(self) -> int:
        """Returns how many blocks are asked back."""
        return sum(event.block_count for event in self.core.take_events() if isinstance(event, LeaseRecalled))

    def offered(self) -> list[tuple[int, int, int]]:
        """Returns the blocks that are offered in place of equal ones: table, index, block."""
        return [row for event in self.core.take_events() if isinstance(event, MergeOffered) for row in event.rows]

    def check(self) -> None:
        """Checks every invariant."""
        invariants.check(self.core)

    def state(self) -> tuple[Any, ...]:
        """Returns what a refused or repeated command must not change."""
        memory, pool = self.core.pool(POOL).memory, self.pool
        slots = memory.tables.open_slots()
        records = [memory.tables.record(slot) for slot in slots]
        tables = [(record.table, record.state, list(record.blocks), list(record.overflow)) for record in records]
        positions = (memory.tables.tokens[slots].tolist(), memory.tables.written[slots].tolist())
        columns = (pool.refs, pool.state, pool.generation, pool.filled, pool.lessee, memory.prefix.published)
        grants = {number: (item.granted_total, item.leased) for number, item in memory.grants.items()}
        return (*(column.tolist() for column in columns), pool.free_order(), tables, positions, grants)

    # Commands

    def admit(self, tokens: Sequence[int], gateway: int = 0, **fields: Any) -> Held:
        """Opens a sequence; whatever it is told is cached must be on the device."""
        number = gateway or self.gateway
        request = AdmitRequest(
            POOL, fields.pop("epoch", self.epoch), f"r{next(self._names)}", 0, pack(list(tokens)), **fields
        )
        admission = self.core.admit(number, request, self.now)
        held = Held(
            gateway=number,
            table=admission.table,
            tokens=list(tokens),
            blocks=list(admission.block_ids),
            cached=admission.cached_token_count,
            copies=list(admission.copies),
            written=admission.cached_token_count,
            tenant=request.tenant,
        )
        assert held.cached < len(tokens), "nothing is left to compute"
        first = max(0, held.cached - self.spec.window + 1) if self.spec.window else 0
        content = self.read(held, held.cached)[first:]
        assert content == held.tokens[first : held.cached], "another content than was asked for"
        self.check()
        return held

    def fork(self, held: Held, count: int = 1, at_token: int = 0) -> list[Held]:
        """Opens sequences that share the beginning of another; they read what it holds."""
        forked = self.core.fork(held.gateway, ForkRequest(POOL, self.epoch, held.table, count, at_token), self.now)
        self.check()
        shared = forked.token_count
        return [
            Held(held.gateway, table, held.tokens[:shared], list(forked.block_ids), shared, [], shared, held.tenant)
            for table in forked.tables
        ]

    def replace(self, held: Held, index: int = -1, block: int = 0) -> int:
        """Puts a block in the place of another, a leased one for the last by default, and returns the old one."""
        at = index % len(held.blocks)
        is_copy = at == held.written // SIZE
        old, held.blocks[at] = held.blocks[at], block or self.lease(1, held.gateway)[0]
        if is_copy:
            held.copies.append((old, held.blocks[at]))
        self.tell(held.gateway, replaced=[held.table, at, held.blocks[at]])
        return old

    def read(self, held: Held, count: int) -> list[int | None]:
        """Returns what the device holds at the first `count` positions, copies that have not run yet included."""
        sources = {target: source for source, target in held.copies}
        found: list[int | None] = []
        for block in held.blocks[: -(-count // SIZE)]:
            found += self.device.get(sources.get(block, block), [None] * SIZE)
        return found[:count]

    def compute(self, held: Held, count: int | None = None) -> None:
        """Has the device write up to `count` tokens (all by default); memsvc does not hear of it."""
        end = len(held.tokens) if count is None else count
        for source, target in held.copies:
            self.device[target] = list(self.device.get(source, [None] * SIZE))
        held.copies = []
        for position in range(held.written, end):
            block = held.blocks[position // SIZE]
            if position % SIZE == 0 or block not in self.device:
                self.device[block] = [None] * SIZE
            self.device[block][position % SIZE] = held.tokens[position]
        held.written = end

    def write(self, held: Held, count: int | None = None) -> None:
        """Has tokens written and tells memsvc."""
        self.compute(held, count)
        self.tell(held.gateway, tables=[held.table], token_starts=[len(held.tokens)], token_counts=[0],
                  written_counts=[held.written])  # fmt: skip

    def extend(self, held: Held, tokens: Sequence[int]) -> dict[str, list[int]]:
        """Adds tokens that are written, with leased blocks as needed; returns the journal, which is told."""
        start = len(held.tokens)
        held.tokens += tokens
        appended: list[int] = []
        missing = -(-len(held.tokens) // SIZE) - len(held.blocks)
        for block in self.lease(missing, held.gateway) if missing > 0 else []:
            appended += [held.table, len(held.blocks), block]
            held.blocks.append(block)
        self.compute(held)
        fields = {
            "tables": [held.table],
            "token_starts": [start],
            "token_counts": [len(tokens)],
            "token_ids": list(tokens),
            "written_counts": [held.written],
            "appended": appended,
        }
        self.tell(held.gateway, **fields)
        return fields

    def close(self, held: Held, reason: CloseReason = CloseReason.FINISHED) -> None:
        """Closes a sequence."""
        self.tell(held.gateway, closed=[held.table], close_reasons=[reason])

    def run(self, tokens: Sequence[int], gateway: int = 0, **fields: Any) -> Held:
        """Opens a sequence, has all of it written, and closes it."""
        held = self.admit(tokens, gateway, **fields)
        self.write(held)
        self.close(held)
        return held

    def tell(self, gateway: int = 0, *, epoch: int = 0, journal_no: int | None = None, **fields: Any) -> bool:
        """Sends a journal."""
        self.now += 0.01
        entry = JournalEntry(POOL, epoch or self.epoch, **fields)
        try:
            return self.core.journal(
                gateway or self.gateway, POOL, entry.epoch, packed(entry), self.now, journal_no=journal_no
            )
        finally:
            self.check()

    def lease(self, count: int, gateway: int = 0) -> list[int]:
        """Leases `count` blocks more than were ever granted; their content is as good as gone."""
        number = gateway or self.gateway
        total = self._leased.get(number, 0)
        blocks = self.core.lease(number, POOL, self.epoch, total + count, self.now)
        self._leased[number] = total + len(blocks)
        for block in blocks:
            self.device[block] = [-1] * SIZE
        self.check()
        return blocks

    def used_tokens(self) -> int:
        """Returns the tokens in used blocks, as operators see them."""
        return views.view_pool(self.core, POOL).used_token_count

    def entries(self, held: Held) -> list[int]:
        """Returns a block table as memsvc has it."""
        tables = self.core.pool(POOL).memory.tables
        return list(tables.record(tables.slot(held.table)).blocks)

    def references(self, blocks: Sequence[int]) -> list[int]:
        """Returns the references of blocks."""
        counts: list[int] = self.pool.refs[np.array(blocks)].tolist()
        return counts
