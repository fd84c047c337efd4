"""Looks at the state without changing it: what operators see of pools, sequences and blocks."""

from __future__ import annotations

import dataclasses

import numpy as np

from memsvc.core.content import Publication
from memsvc.core.memory import MemoryCore
from memsvc.core.pool import BlockState
from memsvc.core.pool_memory import PoolMemory
from memsvc.core.registered import RegisteredPool
from memsvc.core.table import TableRecord, TableState
from quire.errors import BlockNotFoundError, InvalidRequestError, SequenceNotFoundError

_SEQUENCES_NAMED = 8


@dataclasses.dataclass(frozen=True, slots=True)
class PoolView:
    """A pool and where its blocks are; counts as in `quire.memsvc.v1.Pool`."""

    pool: RegisteredPool
    used_token_count: int

    def count(self, state: BlockState) -> int:
        """Returns how many blocks are in `state`."""
        return self.pool.memory.pool.count(state)

    @property
    def used_slot_utilization(self) -> float:
        """Tokens in used blocks / slots of used blocks; 1 when nothing is used."""
        slots = self.count(BlockState.USED) * self.pool.registration.spec.block_size
        return self.used_token_count / slots if slots else 1.0

    @property
    def utilization(self) -> float:
        """Tokens in used blocks / slots of the pool."""
        spec = self.pool.registration.spec
        return self.used_token_count / (spec.usable_block_count * spec.block_size)


@dataclasses.dataclass(frozen=True, slots=True)
class SequenceView:
    """A sequence that holds blocks."""

    pool_id: str
    epoch: int
    gateway_id: str
    record: TableRecord
    token_count: int
    written_token_count: int
    committed_token_count: int

    @property
    def block_count(self) -> int:
        """Blocks in its table, entries outside the sliding window not counted."""
        return len(self.record.blocks) - self.record.blocks.count(0)


@dataclasses.dataclass(frozen=True, slots=True)
class TableEntryView:
    """One entry of a block table."""

    index: int
    block_id: int
    ref_count: int
    generation: int
    written_token_count: int
    identity: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class BlockView:
    """One block: where it is, and why."""

    block_id: int
    state: BlockState
    ref_count: int
    generation: int
    identity: bytes
    sequence_ids: list[str]
    leased_to: str
    explanation: str
    since: float


def view_pool(core: MemoryCore, pool_id: str) -> PoolView:
    """Returns one pool; raises PoolNotFoundError."""
    pool = core.pool(pool_id)
    blocks = pool.memory.pool
    used = int(blocks.filled[blocks.state == BlockState.USED].sum(dtype=np.int64))
    return PoolView(pool, used)


def list_sequences(core: MemoryCore, pool_id: str, after: int, limit: int) -> list[SequenceView]:
    """Returns at most `limit` sequences, the oldest first.

    Args:
        core: the state.
        pool_id: only this pool; empty for all.
        after: only those admitted after the one of this ordinal; -1 for all.
        limit: at most so many.

    Raises:
        PoolNotFoundError: no such pool.
    """
    pools = [core.pool(pool_id)] if pool_id else list(core.pools.values())
    found = [
        (record.ordinal, pool, slot)
        for pool in pools
        for slot, record in _records(pool.memory)
        if record.ordinal > after
    ]
    found.sort(key=lambda item: item[0])
    return [_view_sequence(core, pool, slot) for _, pool, slot in found[:limit]]


def find_sequence(core: MemoryCore, sequence_id: str) -> SequenceView:
    """Returns a sequence by "request/sample", by the request alone (sample 0), or by a unique beginning.

    Of several sequences with the same name, the one admitted last.

    Raises:
        SequenceNotFoundError: there is none.
        InvalidRequestError: the beginning of several.
    """
    exact: dict[str, tuple[int, RegisteredPool, int]] = {}
    begins: dict[str, tuple[int, RegisteredPool, int]] = {}
    for pool in core.pools.values():
        for slot, record in _records(pool.memory):
            name = record.sequence_id
            target = exact if name in {sequence_id, f"{sequence_id}/0"} else begins
            if target is begins and not name.startswith(sequence_id):
                continue
            if name not in target or target[name][0] < record.ordinal:
                target[name] = (record.ordinal, pool, slot)
    found = exact.get(sequence_id) or exact.get(f"{sequence_id}/0")
    if found is None and len(begins) == 1 and sequence_id:
        (found,) = begins.values()
    if found is None and len(begins) > 1 and sequence_id:
        names = ", ".join(sorted(begins)[:_SEQUENCES_NAMED])
        message = f"sequence_id: {sequence_id!r} begins {len(begins)} sequences, among them {names}"
        raise InvalidRequestError(message, field="sequence_id")
    if found is None:
        raise SequenceNotFoundError(f"sequence_id: no sequence {sequence_id[:256]!r} holds blocks")
    return _view_sequence(core, found[1], found[2])


def list_table(core: MemoryCore, sequence: SequenceView, start: int, limit: int) -> list[TableEntryView]:
    """Returns the entries [start, start + limit) of a sequence's block table."""
    memory = core.pool(sequence.pool_id).memory
    size = memory.spec.block_size
    entries = []
    for index, block in enumerate(sequence.record.blocks[start : start + limit], start):
        entries.append(
            TableEntryView(
                index=index,
                block_id=block,
                ref_count=_named_count(memory, block) if block else 0,
                generation=int(memory.pool.generation[block]),
                written_token_count=min(size, max(0, sequence.written_token_count - index * size)) if block else 0,
                identity=memory.prefix.identity(block),
            )
        )
    return entries


def view_block(core: MemoryCore, pool_id: str, block_id: int) -> BlockView:
    """Returns one block.

    Raises:
        PoolNotFoundError: no such pool.
        BlockNotFoundError: no such block.
    """
    pool = core.pool(pool_id)
    blocks = pool.memory.pool
    if not 0 <= block_id < blocks.block_count:
        raise BlockNotFoundError(
            f"block_id: {block_id} is not in pool {pool_id!r}, which has 0 .. {blocks.block_count - 1}",
            field="block_id",
        )
    holders = [record for _, record in _records(pool.memory) if block_id and block_id in record.blocks]
    sources = [record for _, record in _records(pool.memory) if block_id and record.copy_source == block_id]
    lessee = int(blocks.lessee[block_id])
    leased_to = core.gateway(lessee).gateway_id if lessee else ""
    state = BlockState(int(blocks.state[block_id]))
    return BlockView(
        block_id=block_id,
        state=state,
        ref_count=len(holders),
        generation=int(blocks.generation[block_id]),
        identity=pool.memory.prefix.identity(block_id),
        sequence_ids=[record.sequence_id for record in holders],
        leased_to=leased_to,
        explanation=_explain(pool.memory, block_id, holders=holders, sources=sources, leased_to=leased_to),
        since=float(blocks.since[block_id]),
    )


def _records(memory: PoolMemory) -> list[tuple[int, TableRecord]]:
    return [(slot, memory.tables.record(slot)) for slot in memory.tables.open_slots()]


def _named_count(memory: PoolMemory, block: int) -> int:
    """Returns how many table entries name a block: its references but for sources of copies under way."""
    if memory.pool.refs[block] == 1:
        return 1
    copies = sum(record.copy_source == block for _, record in _records(memory))
    return int(memory.pool.refs[block]) - copies


def _view_sequence(core: MemoryCore, pool: RegisteredPool, slot: int) -> SequenceView:
    tables, record = pool.memory.tables, pool.memory.tables.record(slot)
    committed = int(tables.committed[slot]) * pool.memory.spec.block_size if record.publishes else 0
    return SequenceView(
        pool_id=pool.registration.executor_id,
        epoch=pool.epoch,
        gateway_id=core.gateway(record.gateway).gateway_id,
        record=record,
        token_count=int(tables.tokens[slot]),
        written_token_count=int(tables.written[slot]),
        committed_token_count=committed,
    )


def _explain(
    memory: PoolMemory,
    block: int,
    *,
    holders: list[TableRecord],
    sources: list[TableRecord],
    leased_to: str,
) -> str:
    """Returns one sentence: why a block is held, or why it is not."""
    state = memory.pool.state[block]
    if state == BlockState.NULL:
        return "The null block; it stands for no block and is never handed out."
    if state == BlockState.FREE:
        return "Holds nothing that a prompt could match; it is handed out before any cached block."
    if state == BlockState.LEASED:
        return f"Granted to gateway {leased_to} for growth, and not in a table yet."
    if state == BlockState.CACHED:
        partial = memory.prefix.published[block] == Publication.PARTIAL
        kind = f"first {int(memory.pool.filled[block])} tokens" if partial else "content"
        return f"No sequence uses it; its {kind} can be matched until the block is needed."
    if state == BlockState.PENDING:
        if leased_to:
            return f"Was granted to gateway {leased_to}, which is gone; waits for the executor's fence."
        return f"In {len(holders)} tables of gateways that are gone; waits for the executor's fence."
    waiting = sum(record.state == TableState.CLOSING for record in holders)
    text = f"In {len(holders)} block tables"
    if waiting:
        text += f", {waiting} of them waiting for the executor's fence"
    if sources:
        text += f"; kept as the source of {len(sources)} copies that have not run yet"
    return text + "."
