"""Block tables: one per open sequence, in columns.

The slot of a table in every column is its counter modulo the capacity, a power of two. `open` skips counters whose slot
is taken, so that looking up many tables is one vector operation. Counters never repeat within an epoch: one that is
below the next counter and not open is closed for good, which is all the tombstone that is needed.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
import dataclasses
import enum

import numpy as np
import numpy.typing as npt

from memsvc.core.content import NO_EXTRAS
from memsvc.core.free_order import BlockIds
from quire import native

_CAPACITY_MINIMUM = 64
# Up to so many values a loop beats vector operations.
_FEW = 32
TABLE_LIMIT = 2**32
_GROWING = (
    "tokens",
    "written",
    "written_floor",
    "committed",
    "gateway",
    "token_block",
    "write_block",
    "prompt",
    "opened",
    "limit",
    "least",
    "found",
    "length",
    "released",
    "tenant_tag",
    "by_hand",
)

Slots = npt.NDArray[np.int64]


class TableState(enum.IntEnum):
    """Life of a table; the numbers are those of `quire.memsvc.v1.SequenceState`."""

    OPEN = 1
    CLOSING = 2


@dataclasses.dataclass(slots=True)
class TableRecord:
    """What a table needs rarely.

    Attributes:
        table: its counter.
        ordinal: place in the order of admission over all pools and epochs.
        request_id: name of the request.
        sample_index: which of its samples.
        gateway: number of the gateway that owns it.
        tenant: name of the tenant.
        tenant_tag: tag that its blocks carry.
        opened_at: time of admission, in seconds of the caller's clock.
        cached_token_count: tokens found in the cache at admission.
        publishes: whether its blocks may be matched by others.
        blocks: block ids in order, int64; 0 for the leading ones that are outside the sliding window.
        parent: identity of the last committed block, or the root digest.
        copy_source: block that is copied before the first write, 0 for none; referenced as if it were in the table.
        overflow: known tokens for which there is no block yet that this table may write into.
        shared_index: position of the open block if this table may not write into it, -1 if it may; see
            `memsvc.core.fork`.
        merges: blocks that were offered in place of equal ones, by position; referenced as if they were in the table.
        state: open or closing.
        retention: class in which its blocks are retained when it closes, see `memsvc.core.retention`.
        session_id: conversation that it is a turn of.
        extras: what the identity of some blocks covers beside their tokens, by position of the block.
    """

    table: int
    ordinal: int
    request_id: str
    sample_index: int
    gateway: int
    tenant: str
    tenant_tag: int
    opened_at: float
    cached_token_count: int
    publishes: bool
    blocks: array[int]
    parent: bytes
    copy_source: int = 0
    overflow: list[int] = dataclasses.field(default_factory=list)
    shared_index: int = -1
    merges: dict[int, int] = dataclasses.field(default_factory=dict)
    state: TableState = TableState.OPEN
    retention: int = 0
    session_id: str = ""
    extras: Mapping[int, bytes] = dataclasses.field(default_factory=lambda: NO_EXTRAS)

    @property
    def sequence_id(self) -> str:
        """Name for people: "request/sample"."""
        return f"{self.request_id}/{self.sample_index}"

    def block_ids(self) -> BlockIds:
        """Returns a copy of the entries, null ones included."""
        return np.array(self.blocks, np.int64)

    def held_block_ids(self) -> BlockIds:
        """Returns every block that this table has a reference on: its entries, the copy source, what was offered."""
        if not self.copy_source and not self.merges:
            held = self.block_ids()
        else:
            source = [self.copy_source] if self.copy_source else []
            held = np.array([*self.blocks, *source, *self.merges.values()], np.int64)
        return held if held.all() else held[held != 0]


class TableColumns:
    """The open tables of one pool.

    Attributes:
        counter: `[slot]` counter of the table in this slot, -1 for none.
        tokens: `[slot]` tokens known.
        written: `[slot]` tokens confirmed as written.
        written_floor: `[slot]` tokens that must be exceeded before `written` moves: while a copy is under way, the
            tokens that it brings.
        committed: `[slot]` leading blocks that are full, written and hashed.
        gateway: `[slot]` number of the owner.
        token_block: `[slot]` block in which token number `tokens` goes, 0 if it is not there yet.
        write_block: `[slot]` block in which token number `written` goes, 0 if it is not there yet.
        length: `[slot]` entries of the table.
        released: `[slot]` leading entries that are null: blocks outside the sliding window.
        tenant_tag: `[slot]` tag that its blocks carry.
        prompt: `[slot]` tokens that were not generated.
        opened: `[slot]` tokens known when the table was opened; more than `prompt` after a preemption.
        limit: `[slot]` most tokens that the sequence may have.
        least: `[slot]` tokens that it will have at least.
        found: `[slot]` leading blocks that were found in the cache.
        by_hand: `[slot]` not 0 where journals mean more than tokens, growth and written counts: the accelerator leaves
            such tables to `JournalWriter`.
    """

    __slots__ = (
        "_capacity",
        "_native",
        "_next",
        "_records",
        "_scratch",
        "by_hand",
        "committed",
        "counter",
        "found",
        "gateway",
        "least",
        "length",
        "limit",
        "open_count",
        "opened",
        "prompt",
        "released",
        "tenant_tag",
        "token_block",
        "tokens",
        "write_block",
        "written",
        "written_floor",
    )

    def __init__(self) -> None:
        self._capacity = _CAPACITY_MINIMUM
        self._next = 1
        self.open_count = 0
        self._records: list[TableRecord | None] = [None] * self._capacity
        self.counter = np.full(self._capacity, -1, np.int64)
        self.tokens = np.zeros(self._capacity, np.int64)
        self.written = np.zeros(self._capacity, np.int64)
        self.written_floor = np.zeros(self._capacity, np.int64)
        self.committed = np.zeros(self._capacity, np.int64)
        self.gateway = np.zeros(self._capacity, np.int64)
        self.token_block = np.zeros(self._capacity, np.int64)
        self.write_block = np.zeros(self._capacity, np.int64)
        self.prompt = np.zeros(self._capacity, np.int64)
        self.opened = np.zeros(self._capacity, np.int64)
        self.least = np.zeros(self._capacity, np.int64)
        self.limit = np.zeros(self._capacity, np.int64)
        self.found = np.zeros(self._capacity, np.int64)
        self.length = np.zeros(self._capacity, np.int64)
        self.released = np.zeros(self._capacity, np.int64)
        self.tenant_tag = np.zeros(self._capacity, np.int64)
        self.by_hand = np.zeros(self._capacity, np.int64)
        self._native: native.Tables | None = None
        self._scratch = np.zeros(self._capacity, np.int64)

    @property
    def next_counter(self) -> int:
        """The next table's counter is at least this; all below were opened or skipped."""
        return self._next

    def hold(self, accelerator: native.Accelerator) -> native.Tables:
        """Returns the columns in the accelerator; they are others when there was no room for a table any more."""
        if self._native is None:
            columns = (self.counter, self.tokens, self.written, self.written_floor, self.committed, self.gateway)
            more = (self.token_block, self.write_block, self.length, self.tenant_tag, self.by_hand)
            self._native = accelerator.Tables(self._capacity, self._records, *columns, *more)
        return self._native

    def reserve(self) -> int:
        """Returns the counter that `open` may use next; its slot is free."""
        if 2 * self.open_count >= self._capacity:
            self._grow()
        mask = self._capacity - 1
        counter = self._next
        while self.counter[counter & mask] >= 0:
            counter += 1
        return counter

    def open(self, record: TableRecord) -> int:
        """Enters a table whose counter was reserved and returns its slot."""
        slot = record.table & (self._capacity - 1)
        assert self.counter[slot] < 0, record.table
        assert self._next <= record.table < TABLE_LIMIT, record.table
        self._next = record.table + 1
        self.open_count += 1
        self._records[slot] = record
        self.counter[slot] = record.table
        self.gateway[slot] = record.gateway
        self.length[slot] = len(record.blocks)
        self.released[slot] = 0
        self.tenant_tag[slot] = record.tenant_tag
        self.by_hand[slot] = bool(record.extras)
        return slot

    def close(self, slot: int) -> None:
        """Removes a table."""
        self.counter[slot] = -1
        self._records[slot] = None
        self.open_count -= 1

    def record(self, slot: int) -> TableRecord:
        """Returns the record of the open table in `slot`."""
        record = self._records[slot]
        assert record is not None, slot
        return record

    def slot(self, table: int) -> int:
        """Returns the slot of an open table, or -1."""
        slot = table & (self._capacity - 1)
        return slot if self.counter[slot] == table else -1

    def slots(self, tables: npt.NDArray[np.int64]) -> Slots:
        """Returns the slot of each of `tables`, -1 for those that are not open."""
        slots = tables & (self._capacity - 1)
        found = self.counter[slots] == tables
        return slots if found.all() else np.where(found, slots, -1)

    def has_repeats(self, slots: Slots) -> bool:
        """Returns whether a slot is given twice."""
        if len(slots) <= _FEW:
            return len(set(slots.tolist())) < len(slots)
        order = np.arange(len(slots))
        self._scratch[slots] = order
        return not bool((self._scratch[slots] == order).all())

    def open_slots(self) -> list[int]:
        """Returns the slots of all open tables, the oldest table first."""
        slots = np.flatnonzero(self.counter >= 0)
        ordered: list[int] = slots[np.argsort(self.counter[slots], kind="stable")].tolist()
        return ordered

    def fit_scratch(self) -> None:
        """Makes room to compare slots, after the columns were replaced by longer ones."""
        self._native = None
        self._scratch = np.zeros(self._capacity, np.int64)

    def _grow(self) -> None:
        """Doubles the capacity. Counters that differ modulo the old one differ modulo the new one."""
        old = np.flatnonzero(self.counter >= 0)
        capacity = 2 * self._capacity
        new = self.counter[old] & (capacity - 1)
        records: list[TableRecord | None] = [None] * capacity
        for source, target in zip(old.tolist(), new.tolist(), strict=True):
            records[target] = self._records[source]
        self._records = records
        self._native = None
        for name in _GROWING:
            column = np.zeros(capacity, np.int64)
            column[new] = getattr(self, name)[old]
            setattr(self, name, column)
        counter = np.full(capacity, -1, np.int64)
        counter[new] = self.counter[old]
        self.counter = counter
        self._scratch = np.zeros(capacity, np.int64)
        self._capacity = capacity
