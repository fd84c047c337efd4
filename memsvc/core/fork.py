"""Forks: new tables that share the blocks of an open one, and who may write into what they share.

    source    [ 7 ][ 8 ][ 9 . . . ]
    children  [ 7 ][ 8 ][ 9 . . . ]      each: the first `at_token` tokens

A full block is never written again: to share it takes a reference. The block in which the shared tokens end may have
room left, and everybody who names it would write there next. So nobody does: a holder that is about to write puts a
leased block in its place and has the executor copy the shared one (`memsvc.core.replacement`); the last holder writes
in place. A child that was forked from the middle of a block that is full in its source always copies: that block may be
matched by prompts, and is whole.

Until a table may write into its open block its further tokens wait in `TableRecord.overflow`, as if there were no block
yet: the row of tokens of a shared block is nobody's.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import numpy as np

from memsvc.core.table import TableRecord
from quire.errors import InvalidRequestError, SequenceNotFoundError
from quire.memory import Fork, ForkRequest

if TYPE_CHECKING:
    from memsvc.core.pool_memory import PoolMemory

COUNT_MAXIMUM = 1024


class SharedBlocks:
    """The tables that may not write into their open block, and the other holders of those blocks."""

    __slots__ = ("_by_table", "_holders")

    def __init__(self) -> None:
        self._by_table: dict[int, int] = {}
        # Full blocks are not in here: whoever was forked from the middle of one copies it, alone or not.
        self._holders: dict[int, list[int]] = {}

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._by_table)

    def tables(self) -> set[int]:
        """Returns the tables that may not write into their open block."""
        return set(self._by_table)

    def holders(self, block: int) -> list[int]:
        """Returns the tables that share a block with room left; none if it is full or not shared."""
        return self._holders.get(block, [])

    def enter(self, block: int, tables: list[int], *, full: bool) -> None:
        """Notes that `tables` name a block which they may not write into; `full`: it has no room in their source."""
        for table in tables:
            self._by_table[table] = block
        if not full:
            self._holders.setdefault(block, []).extend(tables)

    def leave(self, table: int) -> int:
        """Forgets a table that names its block no more; returns the table that holds it alone now, 0 for none."""
        block = self._by_table.pop(table, 0)
        holders = self._holders.get(block)
        if holders is None:
            return 0
        holders.remove(table)
        if len(holders) > 1:
            return 0
        del self._holders[block]
        del self._by_table[holders[0]]
        return holders[0]


class Departures:
    """Who would hold a shared block alone if some tables left, one after the other. Changes nothing.

    Args:
        shared: what is shared now.

    Attributes:
        alone: tables that would have been alone at some time.
    """

    __slots__ = ("_gone", "_shared", "alone")

    def __init__(self, shared: SharedBlocks) -> None:
        self._shared = shared
        self._gone: dict[int, set[int]] = {}
        self.alone: set[int] = set()

    def leave(self, table: int, block: int) -> None:
        """Supposes that `table` names `block`, which it may share, no more."""
        holders = self._shared.holders(block)
        if table not in holders:
            return
        gone = self._gone.setdefault(block, set())
        gone.add(table)
        if len(holders) - len(gone) == 1:
            self.alone.add(next(holder for holder in holders if holder not in gone))


def fork(memory: PoolMemory, gateway: int, request: ForkRequest, ordinal: int, now: float) -> Fork:
    """Opens tables that share the beginning of an open one: all of them or none; takes no block.

    Args:
        memory: the pool.
        gateway: who asks, and owns the source.
        request: what is asked for.
        ordinal: place of the first new table in the order of admissions.
        now: the caller's clock.

    Raises:
        SequenceNotFoundError: the source is not an open table of this gateway.
        InvalidRequestError: the count or the position is not possible; both limits are named.
        TenantCeilingError: the new tables may grow beyond what their tenant may hold.
    """
    tables, size = memory.tables, memory.spec.block_size
    slot = tables.slot(request.table)
    if slot < 0 or tables.gateway[slot] != gateway:
        message = f"table: {request.table} is not an open table of this gateway in epoch {memory.epoch}"
        raise SequenceNotFoundError(message, field="table")
    source = tables.record(slot)
    if not 1 <= request.count <= COUNT_MAXIMUM:
        message = f"count: found {request.count}, allowed are 1 .. {COUNT_MAXIMUM}"
        raise InvalidRequestError(message, field="count")
    at_token = _position(memory, slot, source, request)
    full, rest = divmod(at_token, size)
    committed = int(tables.committed[slot])
    gate = memory.gate(source.tenant_tag)
    if gate is not None:
        gate.require_growth(source, tables, request.count, full)
    shared = source.blocks[: full + (rest > 0)]
    # As many as are outside the window at `at_token`: see `_position`.
    outside = int(tables.released[slot])
    shared[:outside] = array("q", bytes(8 * outside))
    for index, kept in source.merges.items():
        if outside <= index < full:
            shared[index] = kept
    blocks = np.array(shared, np.int64)
    parent = source.parent
    if source.publishes and full < committed:
        parent = memory.prefix.parent(source.blocks[full])
    # An item that ends behind the fork is still part of what the open block holds.
    extras = {index: extra for index, extra in source.extras.items() if index <= full}
    children = []
    for number in range(request.count):
        child = TableRecord(
            table=tables.reserve(),
            ordinal=ordinal + number,
            request_id=source.request_id,
            sample_index=request.first_sample_index + number,
            gateway=gateway,
            tenant=source.tenant,
            tenant_tag=source.tenant_tag,
            opened_at=now,
            cached_token_count=at_token,
            publishes=source.publishes,
            retention=source.retention,
            session_id=source.session_id,
            blocks=array("q", shared),
            parent=parent,
            shared_index=full if rest else -1,
            extras=extras,
        )
        memory.pool.share(blocks[blocks > 0], now)
        _open(memory, child, at_token, full, source)
        tables.released[tables.slot(child.table)] = outside
        children.append(child.table)
    must_copy = False
    if rest:
        must_copy = full < committed or (source.shared_index == full and not memory.shared.holders(shared[full]))
        holders = list(children)
        if not must_copy and source.shared_index != full:
            holders.insert(0, source.table)
            source.shared_index = full
            memory.refresh_open_blocks(tables.slot(source.table))
        memory.shared.enter(shared[full], holders, full=must_copy)
    return Fork(memory.epoch, children, list(shared), at_token, must_copy=must_copy)


def _position(memory: PoolMemory, slot: int, source: TableRecord, request: ForkRequest) -> int:
    """Returns how many tokens are shared; raises InvalidRequestError if they are not written."""
    tables = memory.tables
    written = int(tables.written[slot])
    if source.copy_source:
        # What is behind the full blocks is in a block whose copy may not have run.
        written = int(tables.committed[slot]) * memory.spec.block_size
    at_token = request.at_token or written
    # What the token at the fork reads must not have been released.
    released = int(tables.released[slot])
    least = released * memory.spec.block_size + memory.window - 1 if released else 1
    if not least <= at_token <= written:
        message = (
            f"at_token: found {request.at_token}, allowed are {least} .. {written}: of table {source.table} {written} "
            f"tokens are written and {int(tables.tokens[slot])} known, and {released} blocks were released"
        )
        raise InvalidRequestError(message, field="at_token")
    return at_token


def _open(memory: PoolMemory, child: TableRecord, at_token: int, full: int, source: TableRecord) -> None:
    """Enters a child, all of whose tokens are written; `full` of its blocks are committed."""
    tables = memory.tables
    slot, before = tables.open(child), tables.slot(source.table)
    memory.grants_of(child.gateway).tables.add(child.table)
    tables.tokens[slot] = tables.written[slot] = at_token
    tables.written_floor[slot] = 0
    tables.committed[slot] = tables.found[slot] = full
    tables.prompt[slot] = min(at_token, int(tables.prompt[before]))
    tables.opened[slot] = at_token
    tables.limit[slot] = tables.limit[before]
    # It may write into none of its blocks: into the last one others would write too, and the others are full.
    tables.token_block[slot] = tables.write_block[slot] = 0
