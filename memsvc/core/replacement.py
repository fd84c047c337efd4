"""The `replaced` rows of a journal: another block takes the place of one in a table.

There are two causes. A gateway is about to write into a block that other tables share, and puts a leased block in its
place, which the executor fills with a copy; the shared block stays referenced until the table is reported written
beyond what the copy brings. Or a full block holds what is published in another one already: memsvc offered that other
one (`PoolMemory.publish`), and the gateway says that the executor's table names it and nothing in flight reads the old.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from memsvc.core.content import Publication
from memsvc.core.fork import Departures
from memsvc.core.journal import Column
from memsvc.core.table import Slots
from quire.errors import StaleEpochError

if TYPE_CHECKING:
    from memsvc.core.pool_memory import PoolMemory


@dataclasses.dataclass(frozen=True, slots=True)
class Replacement:
    """A checked row."""

    slot: int
    index: int
    block: int
    is_copy: bool
    """Whether the executor copies the old block; if not, the two are equal and this one was offered."""


def _refuse(message: str, reason: str, field: str = "replaced") -> NoReturn:
    """Raises: a row does not fit the state it meets."""
    raise StaleEpochError(message, reason=reason, field=field)


def check(
    memory: PoolMemory, gateway: int, rows: tuple[Column, list[int]], closing: list[int], taken: set[int]
) -> tuple[list[Replacement], set[int]]:
    """Returns what is to be replaced, and which tables may write into their open block by this and by what closes.

    Args:
        memory: the pool.
        gateway: who says it.
        rows: triples (table, index, block), and the slot of each table, -1 for one that is closed: it is left out, as
            are rows that say what is so already.
        closing: slots of the tables that the same journal closes, in order.
        taken: blocks that the journal has appended to tables; those replaced with are added.

    Raises:
        StaleEpochError: the entry is not the open one of its table, nobody shares it, or the block is not leased to
            this gateway.
    """
    departures = Departures(memory.shared)
    found: dict[tuple[int, int], Replacement] = {}
    for (table, index, block), slot in zip(rows[0].tolist(), rows[1], strict=True):
        if slot < 0:
            continue
        record = memory.tables.record(slot)
        if index < memory.tables.released[slot]:
            # Offered before the window had left it.
            continue
        earlier = found.get((slot, index))
        known = record.blocks[index] if earlier is None and index < len(record.blocks) else 0
        if block in {known, earlier.block if earlier is not None else 0} and block:
            continue
        if record.merges.get(index) == block and earlier is None:
            found[slot, index] = Replacement(slot, index, block, is_copy=False)
            continue
        if record.shared_index != index or table in departures.alone or earlier is not None:
            _refuse(
                f"replaced: entry {index} of table {table} is not an open block that others share, and no block was "
                "offered for it",
                "BLOCK_NOT_SHARED",
            )
        if not 0 < block < memory.pool.block_count or memory.pool.lessee[block] != gateway or block in taken:
            _refuse(f"replaced: block {block} is not leased to this gateway", "BLOCK_NOT_LEASED")
        taken.add(block)
        departures.leave(table, record.blocks[index])
        found[slot, index] = Replacement(slot, index, block, is_copy=True)
    for slot in closing:
        record = memory.tables.record(slot)
        if record.shared_index >= 0:
            departures.leave(record.table, record.blocks[record.shared_index])
    copied = {memory.tables.record(row.slot).table for row in found.values() if row.is_copy}
    return list(found.values()), copied | departures.alone


def check_writes(memory: PoolMemory, slots: Slots, written: Column, writable: set[int]) -> None:
    """Refuses to confirm writes of `slots` up to `written` into blocks that other tables name.

    Args:
        memory: the pool.
        slots: `[row]` slot of a table.
        written: `[row]` tokens confirmed as written.
        writable: tables that share their open block now, and will not when the rows are applied.

    Raises:
        StaleEpochError: naming the table and the block.
    """
    for slot, count in zip(slots.tolist(), written.tolist(), strict=True):
        record = memory.tables.record(slot)
        if record.shared_index < 0 or count <= memory.tables.written[slot] or record.table in writable:
            continue
        block = record.blocks[record.shared_index]
        message = f"written_counts: table {record.table} was written up to {count} in block {block}, which others hold"
        _refuse(message, "SHARED_BLOCK", "written_counts")


def apply(memory: PoolMemory, gateway: int, replacements: list[Replacement], now: float) -> None:
    """Puts blocks in the place of others."""
    for replacement in replacements:
        if replacement.is_copy:
            _copy(memory, gateway, replacement, now)
        else:
            _merge(memory, replacement, now)


def _copy(memory: PoolMemory, gateway: int, replacement: Replacement, now: float) -> None:
    """Gives a table a block of its own, of which the tokens that it shares are known and none is written."""
    tables, slot = memory.tables, replacement.slot
    record = tables.record(slot)
    block = np.array([replacement.block])
    old = record.blocks[replacement.index]
    memory.pool.adopt(block, now)
    memory.pool.tenant[block] = record.tenant_tag
    if memory.tenancy is not None:
        memory.tenancy.entered(block, memory.tenancy.known(record.tenant_tag))
    memory.grants_of(gateway).leased -= 1
    memory.prefix.tokens[replacement.block] = memory.prefix.tokens[old]
    record.blocks[replacement.index] = replacement.block
    # The reference of the entry becomes that of the copy under way.
    record.copy_source = old
    tables.written_floor[slot] = tables.written[slot]
    memory.leave_shared(record)
    memory.write_in_place(slot)


def _merge(memory: PoolMemory, replacement: Replacement, now: float) -> None:
    """Lets a table name the published block instead of its equal one, whose reference is dropped."""
    record = memory.tables.record(replacement.slot)
    old = np.array([record.blocks[replacement.index]])
    # The reference of the offer becomes that of the entry.
    record.blocks[replacement.index] = record.merges.pop(replacement.index)
    if memory.pool.refs[old[0]] == 1 and memory.prefix.published[old[0]] == Publication.DUPLICATE:
        memory.prefix.forget(old)
    memory.pool.drop(old, memory.prefix.published[old] != Publication.NONE, now)
