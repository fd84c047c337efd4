"""What must hold between any two commands. Cheap enough to check whenever a pool is idle."""

from __future__ import annotations

import numpy as np

from memsvc.core import retention
from memsvc.core.content import Publication
from memsvc.core.memory import MemoryCore
from memsvc.core.pool import BlockState
from memsvc.core.pool_memory import PoolMemory
from memsvc.core.residency import ACCESS_LIMIT, ResidencySampler
from memsvc.core.table import TableRecord, TableState
from memsvc.core.tenancy import Tenancy
from quire.errors import InvariantError
from quire.units import div_ceil
from quire.window import outside_block_count


def check(core: MemoryCore) -> None:
    """Checks every pool.

    Raises:
        InvariantError: naming the invariant, the pool and the block or table.
    """
    for pool_id, pool in core.pools.items():
        _require(
            pool.memory.epoch == pool.epoch, f"pool {pool_id}: tables of epoch {pool.memory.epoch}, now {pool.epoch}"
        )
        check_pool(pool.memory)
        known = {gateway.number for gateway in core.gateways}
        _require(pool.memory.grants.keys() <= known, f"pool {pool_id}: grants of unknown gateways")


def check_pool(memory: PoolMemory) -> None:
    """Checks one pool; raises as `check`."""
    _check_references(memory)
    _check_states(memory)
    _check_tables(memory)
    _check_sharing(memory)
    _check_publications(memory)
    _check_grants(memory)
    if memory.tenancy is not None:
        _check_tenants(memory, memory.tenancy)
    if memory.pool.residencies is not None:
        _check_residencies(memory, memory.pool.residencies)


def _require(condition: object, message: str) -> None:
    if not bool(condition):
        raise InvariantError(message)


def _records(memory: PoolMemory) -> list[tuple[int, TableRecord]]:
    return [(slot, memory.tables.record(slot)) for slot in memory.tables.open_slots()]


def _check_references(memory: PoolMemory) -> None:
    """References equal the table entries and copy sources that name the block; so do those of closing tables."""
    pool = memory.pool
    for closing, column in ((None, pool.refs), (TableState.CLOSING, pool.closing_refs)):
        named = [record.held_block_ids() for _, record in _records(memory) if closing in {None, record.state}]
        blocks = np.concatenate(named) if named else np.zeros(0, np.int64)
        inside = (blocks > 0) & (blocks < pool.block_count)
        _require(inside.all(), f"block {blocks[~inside][:1]} is in a table and not in the pool")
        expected = np.bincount(blocks, minlength=pool.block_count)
        wrong = np.flatnonzero(expected != column)
        _require(
            not len(wrong), f"block {wrong[:1]}: {column[wrong[:1]]} references, named {expected[wrong[:1]]} times"
        )


def _check_states(memory: PoolMemory) -> None:
    """Every block is in one state, which its references and leases explain; the free orders hold each block once."""
    pool = memory.pool
    counts = np.bincount(pool.state, minlength=BlockState.NULL + 1)
    for state in BlockState:
        _require(
            counts[state] == pool.count(state), f"{state.name}: {counts[state]} blocks, counted {pool.count(state)}"
        )
    _require(pool.state[0] == BlockState.NULL and pool.refs[0] == 0, "the null block is in use")
    used, pending = pool.state == BlockState.USED, pool.state == BlockState.PENDING
    leased = pool.state == BlockState.LEASED
    named = pool.refs > 0
    _require(
        (used == (named & (pool.refs > pool.closing_refs))).all(), "a used block has no open table, or the reverse"
    )
    _require(
        (pending == ((named & ~used) | ((pool.lessee > 0) & ~leased))).all(), "pending blocks are not those closing"
    )
    _require((pool.lessee[leased] > 0).all(), "a leased block has no gateway")
    _require(not (pool.lessee[~leased & ~pending] > 0).any(), "a block that is not leased has a gateway")
    order = pool.free_order()
    free = set(np.flatnonzero((pool.state == BlockState.FREE) | (pool.state == BlockState.CACHED)).tolist())
    _require(len(order) == len(set(order)) and set(order) == free, "the free order is not the free and cached blocks")
    blank = order[: pool.count(BlockState.FREE)]
    _require((pool.state[blank] == BlockState.FREE).all(), "a cached block is ahead of a blank one")


def _check_tables(memory: PoolMemory) -> None:
    """Positions are in order, blocks suffice and are not too many, tenants agree, writable blocks are private."""
    size, pool = memory.spec.block_size, memory.pool
    entries = [record.block_ids() for _, record in _records(memory)]
    named = np.bincount(np.concatenate(entries) if entries else np.zeros(0, np.int64), minlength=pool.block_count)
    for slot, record in _records(memory):
        tokens, written = int(memory.tables.tokens[slot]), int(memory.tables.written[slot])
        committed = int(memory.tables.committed[slot])
        name = f"table {record.table}"
        _require(committed * size <= written <= tokens, f"{name}: {committed} blocks, {written}, {tokens} out of order")
        _require(written <= len(record.blocks) * size, f"{name}: written past its blocks")
        _require(committed == written // size, f"{name}: {written} tokens written, {committed} blocks committed")
        _check_overflow(memory, slot, record)
        limit = div_ceil(memory.spec.max_model_len + size, size)
        _require(len(record.blocks) <= limit, f"{name}: {len(record.blocks)} blocks, at most {limit}")
        blocks = record.block_ids()
        _require(memory.tables.length[slot] == len(blocks), f"{name}: {memory.tables.length[slot]} blocks counted")
        _require(memory.tables.tenant_tag[slot] == record.tenant_tag, f"{name}: another tenant in its column")
        outside = outside_block_count(written, memory.window, size)
        _require(memory.tables.released[slot] == outside, f"{name}: {outside} blocks are outside the window")
        _require(not blocks[:outside].any(), f"{name}: holds a block outside the window")
        _require(blocks[outside:].all(), f"{name}: a block inside the window is null")
        held = blocks[outside:]
        _require(len(set(held.tolist())) == len(held), f"{name}: names a block twice")
        _require((pool.tenant[record.held_block_ids()] == record.tenant_tag).all(), f"{name}: another tenant's block")
        writable = blocks[committed + (record.shared_index == committed) :]
        private = named[writable] == 1
        _require(private.all(), f"{name}: may write block {writable[~private][:1]}, which others hold")
        _require((memory.prefix.published[writable] == Publication.NONE).all(), f"{name}: may write a published block")
        _require((pool.filled[blocks[outside:committed]] == size).all(), f"{name}: a committed block is not filled")
        for position, column in ((tokens, memory.tables.token_block), (written, memory.tables.write_block)):
            index = position // size
            waits = index == record.shared_index or (position == tokens and record.overflow)
            expected = record.blocks[index] if index < len(record.blocks) and not waits else 0
            _require(column[slot] == expected, f"{name}: open block {column[slot]}, expected {expected}")


def _check_overflow(memory: PoolMemory, slot: int, record: TableRecord) -> None:
    """Tokens wait only where there is no block for them that may be written."""
    size = memory.spec.block_size
    tokens, written = int(memory.tables.tokens[slot]), int(memory.tables.written[slot])
    overflow = max(0, tokens - len(record.blocks) * size)
    found = len(record.overflow)
    if record.shared_index >= 0 and found > overflow:
        overflow = min(found, tokens - written)
    _require(found == overflow, f"table {record.table}: {found} tokens wait, expected {overflow}")


def _check_sharing(memory: PoolMemory) -> None:
    """Who may not write into its open block shares it with another, or it is full and may be matched."""
    records = {record.table: (slot, record) for slot, record in _records(memory)}
    marked = {table for table, (_, record) in records.items() if record.shared_index >= 0}
    _require(memory.shared.tables() == marked, f"shared blocks of {memory.shared.tables()}, marked are {marked}")
    for table in marked:
        slot, record = records[table]
        _require(
            record.shared_index == memory.tables.committed[slot], f"table {table}: shares a block that is not open"
        )
        block = record.blocks[record.shared_index]
        holders = memory.shared.holders(block)
        others = {name for name, (_, other) in records.items() if block in other.blocks}
        if holders:
            _require(
                len(holders) > 1 and set(holders) == others, f"block {block}: held by {holders}, named by {others}"
            )
        else:
            _require(
                memory.pool.filled[block] == memory.spec.block_size, f"block {block}: shared by none, and not full"
            )
    offered = [(record, index, kept) for _, record in records.values() for index, kept in record.merges.items()]
    for record, index, kept in offered:
        equal = (memory.prefix.tokens[kept] == memory.prefix.tokens[record.blocks[index]]).all()
        _require(equal and kept != record.blocks[index], f"table {record.table}: block {kept} was offered for another")


def _check_publications(memory: PoolMemory) -> None:
    """Identity -> block and block -> identity are inverse; what is cached can be matched and was written."""
    pool, prefix = memory.pool, memory.prefix
    published = prefix.published
    full = np.flatnonzero(published == Publication.FULL)
    for block in full.tolist():
        _require(prefix.block_of(prefix.identity(block)) == block, f"block {block}: its identity names another")
    _require((pool.filled[full] == memory.spec.block_size).all(), "a published block is not fully written")
    matchable = (published == Publication.FULL) | (published == Publication.PARTIAL)
    cached = pool.state == BlockState.CACHED
    _require(matchable[cached].all(), "a cached block cannot be matched")
    _require(
        not published[(pool.state == BlockState.FREE) | (pool.state == BlockState.LEASED)].any(),
        "a blank block matches",
    )
    partial = np.flatnonzero(published == Publication.PARTIAL)
    _require((pool.filled[partial] > 0).all(), "a partial block has nothing in it")


def _check_grants(memory: PoolMemory) -> None:
    """What each gateway holds is what its tables and leases say."""
    tables: dict[int, set[int]] = {}
    for _, record in _records(memory):
        tables.setdefault(record.gateway, set()).add(record.table)
    for number, grants in memory.grants.items():
        _require(grants.tables == tables.get(number, set()), f"gateway {number}: tables {grants.tables}")
        leased = int(np.count_nonzero(memory.pool.lessee == number))
        _require(grants.leased == leased, f"gateway {number}: {grants.leased} blocks leased, {leased} found")
    _require(tables.keys() <= memory.grants.keys(), "a table has no gateway")


def _check_tenants(memory: PoolMemory, tenancy: Tenancy) -> None:
    """What each tenant is counted to have is what the blocks say; every cached block is in the order of eviction."""
    pool, owner, kept = memory.pool, tenancy.owner, tenancy.retention
    held, cached = pool.refs > 0, pool.state == BlockState.CACHED
    owned = held | cached
    _require(((owner > 0) == owned).all(), "a block that nobody holds has a tenant, or the reverse")
    numbers = tenancy.numbers(pool.tenant[owned].astype(np.int64))
    _require((owner[owned] == numbers).all(), "a block is counted for another tenant")
    _require(not kept[~owned].any(), "a blank block is retained")
    pinned = kept == retention.PINNED
    figures = {
        "held": held,
        "cached": cached,
        "retained": (kept > 0) & ~pinned,
        "pinned": pinned,
        "pinned_cached": pinned & cached,
    }
    for name, blocks in figures.items():
        column = getattr(tenancy, name)
        expected = np.bincount(owner[blocks], minlength=len(column))
        wrong = np.flatnonzero(expected != column)
        _require(not len(wrong), f"tenant {wrong[:1]}: {column[wrong[:1]]} {name} blocks, found {expected[wrong[:1]]}")
    order = tenancy.blocks()
    _require(len(order) == len(tenancy) and set(order.tolist()) == set(np.flatnonzero(cached).tolist()),
             "the order of eviction is not the cached blocks")  # fmt: skip


def _check_residencies(memory: PoolMemory, sampler: ResidencySampler) -> None:
    """Who is followed holds something; a life is at least as long as its idle part, and few accesses are kept."""
    pool = memory.pool
    followed = np.flatnonzero(sampler.followed)
    _require(set(followed.tolist()) == sampler.lives.keys(), "the lives are not those of the blocks followed")
    blank = followed[(pool.state[followed] == BlockState.FREE) | (pool.state[followed] == BlockState.NULL)]
    _require(not len(blank), f"block {blank[:1]}: is followed and holds nothing")
    for block, life in sampler.lives.items():
        resting = pool.state[block] == BlockState.CACHED
        _require(not resting or life.released == pool.since[block], f"block {block}: its release was not noted")
        _require(life.born <= pool.since[block], f"block {block}: its life began after it was last used")
    for life in [*sampler.lives.values(), *sampler.records()]:
        name = f"life of block {life.block_id}"
        _require(len(life.accesses) <= ACCESS_LIMIT, f"{name}: {len(life.accesses)} accesses")
        inside = all(life.born <= access for access in life.accesses)
        _require(inside, f"{name}: an access before it began")
    for life in sampler.records():
        _require(0 <= life.idle <= life.lifetime, f"life of block {life.block_id}: idle for longer than it was")
        inside = all(access <= life.ended for access in life.accesses)
        _require(inside, f"life of block {life.block_id}: an access after it ended")
