"""Blocks and sequences as history watches them, and what is said of their changes."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Final

from memsvc.core.content import Publication
from memsvc.core.history import Change
from memsvc.core.log import Segment
from memsvc.core.memory import MemoryCore
from memsvc.core.pool import BlockState
from memsvc.core.pool_memory import PoolMemory
from memsvc.core.registered import RegisteredPool
from memsvc.core.table import TableRecord, TableState
from quire.errors import BlockNotFoundError, InvalidRequestError, SequenceNotFoundError
from quire.memory import AdmitRequest

_NAMES_SHOWN: Final = 8


@dataclasses.dataclass(frozen=True, slots=True)
class BlockFacts:
    """A block at one time.

    Attributes:
        epoch: epoch of its pool.
        state: where it is.
        ref_count: references, those of copies under way included.
        generation: how often it was given new content.
        publication: how far its content can be matched.
        leased_to: number of the gateway that it is granted to, 0 for none.
    """

    epoch: int
    state: BlockState
    ref_count: int
    generation: int
    publication: Publication
    leased_to: int


class BlockWatch:
    """Watches one block.

    Args:
        pool_id: its pool.
        block_id: its number.
    """

    def __init__(self, pool_id: str, block_id: int) -> None:
        self._pool_id = pool_id
        self._block_id = block_id
        self._before: BlockFacts | None = None
        self._holders: list[str] = []

    def begin(self, core: MemoryCore) -> list[Change]:
        """Notes how the block is; a block that was never used is not worth a record."""
        self._before = self._look(core)
        self._holders = self._named(core)
        before = self._before
        if before is None or (before.state == BlockState.FREE and not before.generation):
            return []
        return [Change(None, before, self._one(self._holders), _of_state(before, self._holders))]

    def compare(self, core: MemoryCore, command: str) -> list[Change]:
        """Returns how the block changed, if it did."""
        before, after = self._before, self._look(core)
        if before == after:
            return []
        lost, self._holders = self._holders, self._named(core)
        self._before = after
        gained = [name for name in self._holders if name not in lost]
        left = [name for name in lost if name not in self._holders]
        return [
            Change(before, after, self._one(gained or left or self._holders), self._explain(before, after, command))
        ]

    def _look(self, core: MemoryCore) -> BlockFacts | None:
        pool = core.pools.get(self._pool_id)
        if pool is None or self._block_id >= pool.memory.pool.block_count:
            return None
        blocks, at = pool.memory.pool, self._block_id
        return BlockFacts(
            epoch=pool.epoch,
            state=BlockState(int(blocks.state[at])),
            ref_count=int(blocks.refs[at]),
            generation=int(blocks.generation[at]),
            publication=Publication(int(pool.memory.prefix.published[at])),
            leased_to=int(blocks.lessee[at]),
        )

    def _named(self, core: MemoryCore) -> list[str]:
        """Returns the sequences whose tables name the block."""
        pool = core.pools.get(self._pool_id)
        return [record.sequence_id for record in _records(pool) if self._block_id in record.blocks] if pool else []

    def _one(self, names: Sequence[str]) -> str:
        return names[0] if names else ""

    def _explain(self, before: BlockFacts | None, after: BlockFacts | None, command: str) -> str:
        """Returns what happened, in a sentence."""
        if after is None:
            return "The pool has no such block any more."
        if before is None or before.epoch != after.epoch:
            return f"Epoch {after.epoch} of the pool began: everything before it is void."
        said = []
        if before.generation != after.generation and before.publication != Publication.NONE:
            said.append("its content was forgotten to make room")
        if before.state != after.state or before.generation != after.generation:
            said.append(_of_state(after, self._holders).rstrip(".").lower())
        elif before.ref_count != after.ref_count:
            said.append(f"{'shared' if after.ref_count > before.ref_count else 'dropped'}: {_in_tables(self._holders)}")
        if before.publication != after.publication and before.generation == after.generation:
            said.append(_PUBLICATIONS[after.publication])
        text = "; ".join(said) or f"changed by {command}"
        return f"{text[0].upper()}{text[1:]}."


_PUBLICATIONS: Final = {
    Publication.NONE: "its content cannot be matched any more",
    Publication.FULL: "full and written: prompts can match it",
    Publication.PARTIAL: "its head can be matched by copy",
    Publication.DUPLICATE: "its content is published in another block",
}


def _in_tables(holders: Sequence[str]) -> str:
    named = ", ".join(holders[:_NAMES_SHOWN]) + (", ..." if len(holders) > _NAMES_SHOWN else "")
    return f"in {len(holders)} block table{'' if len(holders) == 1 else 's'}" + (f" ({named})" if holders else "")


def _of_state(facts: BlockFacts, holders: Sequence[str]) -> str:
    """Returns where a block is, as a sentence."""
    return {
        BlockState.FREE: "Free: it holds nothing that a prompt could match.",
        BlockState.CACHED: "Cached: no sequence uses it, its content can be matched.",
        BlockState.USED: f"Used: {_in_tables(holders)}.",
        BlockState.PENDING: "Pending free: it waits for the executor's fence.",
        BlockState.LEASED: f"Leased: granted to gateway number {facts.leased_to} to grow with.",
        BlockState.NULL: "The null block, which belongs to nobody.",
    }[facts.state]


@dataclasses.dataclass(frozen=True, slots=True)
class SequenceFacts:
    """A sequence's table at one time; tokens alone make no record, or there would be one a step.

    Attributes:
        epoch: epoch of its pool.
        table: counter of its table.
        state: open or closing.
        block_count: blocks of the table.
        committed_count: leading blocks that are full and written.
        is_copying: whether a copy has not run yet.
        token_count: tokens known.
        written_token_count: tokens whose keys and values are confirmed.
    """

    epoch: int
    table: int
    state: TableState
    block_count: int
    committed_count: int
    is_copying: bool
    token_count: int = dataclasses.field(compare=False)
    written_token_count: int = dataclasses.field(compare=False)


class SequenceWatch:
    """Watches the tables of one sequence, or of all samples of a request.

    Args:
        sequence_id: the sequence, "request/sample"; empty to go by the request.
        request_id: the request whose every sample is watched; empty to go by the sequence.
    """

    def __init__(self, sequence_id: str = "", request_id: str = "") -> None:
        self._sequence_id = sequence_id
        self._request_id = request_id
        self._tables: dict[tuple[str, int, int], tuple[str, SequenceFacts]] = {}
        self._seen: dict[str, tuple[PoolMemory, int]] = {}

    def begin(self, core: MemoryCore) -> list[Change]:
        """Notes the tables that are open."""
        return self._new(core, "Open")

    def compare(self, core: MemoryCore, command: str) -> list[Change]:
        """Returns which tables opened, changed, or are gone."""
        changes = []
        for key, (name, before) in list(self._tables.items()):
            pool = core.pools[key[0]]
            after = _sequence_facts(pool, before.table) if pool.epoch == key[1] else None
            if after is None:
                del self._tables[key]
                why = "closed" if pool.epoch == key[1] else f"void: epoch {pool.epoch} of the pool began"
                text = (
                    f"Table {before.table} is {why}, after {before.token_count} tokens in {before.block_count} blocks."
                )
                changes.append(Change(before, None, name, text))
                continue
            self._tables[key] = (name, after)
            if after != before:
                changes.append(Change(before, after, name, _explain_sequence(before, after)))
        return changes + self._new(core, "Opened" if command != "fork" else "Forked")

    def _new(self, core: MemoryCore, word: str) -> list[Change]:
        """Returns tables of the sequences that were opened since the last call."""
        changes = []
        for pool_id, pool in core.pools.items():
            memory, first = self._seen.get(pool_id, (None, 0))
            tables = pool.memory.tables
            if memory is not pool.memory:
                first = 0
            if first == tables.next_counter:
                continue
            self._seen[pool_id] = (pool.memory, tables.next_counter)
            for record in _records(pool):
                if record.table < first or not (
                    record.sequence_id == self._sequence_id
                    if self._sequence_id
                    else record.request_id == self._request_id
                ):
                    continue
                facts = _sequence_facts(pool, record.table)
                assert facts is not None, record.table
                self._tables[pool_id, pool.epoch, record.table] = (record.sequence_id, facts)
                text = (
                    f"{word} as table {record.table}: {facts.token_count} tokens in {facts.block_count} blocks, "
                    f"{record.cached_token_count} tokens found in the cache."
                )
                changes.append(Change(None, facts, record.sequence_id, text))
        return changes


def _explain_sequence(before: SequenceFacts, after: SequenceFacts) -> str:
    """Returns what happened to a table, in a sentence."""
    said = []
    if before.state != after.state:
        said.append("its gateway is gone, it waits for the executor's fence")
    if before.block_count != after.block_count:
        said.append(f"{after.block_count - before.block_count:+} blocks, now {after.block_count}")
    if before.is_copying and not after.is_copying:
        said.append("its copy has run")
    if before.committed_count != after.committed_count:
        said.append(f"{after.committed_count} blocks are full and written")
    text = "; ".join(said)
    return f"{text[0].upper()}{text[1:]}; {after.token_count} tokens known, {after.written_token_count} written."


def _records(pool: RegisteredPool) -> list[TableRecord]:
    tables = pool.memory.tables
    return [tables.record(slot) for slot in tables.open_slots()]


def _sequence_facts(pool: RegisteredPool, table: int) -> SequenceFacts | None:
    tables = pool.memory.tables
    slot = tables.slot(table)
    if slot < 0:
        return None
    record = tables.record(slot)
    return SequenceFacts(
        epoch=pool.epoch,
        table=table,
        state=record.state,
        block_count=len(record.blocks),
        committed_count=int(tables.committed[slot]),
        is_copying=record.copy_source != 0,
        token_count=int(tables.tokens[slot]),
        written_token_count=int(tables.written[slot]),
    )


def watch_block(core: MemoryCore, pool_id: str, block_id: int) -> BlockWatch:
    """Returns a watch of a block.

    Raises:
        PoolNotFoundError: no such pool.
        BlockNotFoundError: no such block.
    """
    count = core.pool(pool_id).memory.pool.block_count
    if not 0 <= block_id < count:
        message = f"block_id: {block_id} is not in pool {pool_id!r}, which has 0 .. {count - 1}"
        raise BlockNotFoundError(message, field="block_id")
    return BlockWatch(pool_id, block_id)


def watch_sequence(segments: Sequence[Segment], name: str) -> SequenceWatch:
    """Returns a watch of a sequence by "request/sample", of a request's every sample, or by a unique beginning.

    Raises:
        SequenceNotFoundError: the log does not tell of it.
        InvalidRequestError: the beginning of several.
    """
    requests: set[str] = set()
    if segments:
        for pool in segments[0].base.pools.values():
            requests |= {record.request_id for record in _records(pool)}
    for segment in segments:
        for entry in segment.entries(stop=len(segment.lines)):
            requests |= {
                value.request_id for value in (*entry.args, *entry.kwargs.values()) if type(value) is AdmitRequest
            }
    if name in requests:
        return SequenceWatch(request_id=name)
    request_id, _, sample = name.rpartition("/")
    if request_id in requests and sample.isdecimal():
        return SequenceWatch(name)
    begins = [each for each in requests if each.startswith(name)] if name else []
    if not begins:
        raise SequenceNotFoundError(f"sequence_id: the log does not tell of a sequence {name[:256]!r}")
    if len(begins) > 1:
        names = ", ".join(sorted(begins)[:_NAMES_SHOWN])
        message = f"sequence_id: {name!r} begins {len(begins)} requests, among them {names}"
        raise InvalidRequestError(message, field="sequence_id")
    return SequenceWatch(request_id=begins[0])
