"""Recent traffic of a pool, read from the command log: which blocks requests asked for, and which they left behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import numpy as np

from memsvc.core import snapshot
from memsvc.core.commands import COMMANDS
from memsvc.core.history import begins_at
from memsvc.core.log import ROOT, Entry, Segment
from memsvc.core.memory import MemoryCore
from memsvc.core.pool_memory import PoolMemory
from memsvc.core.replay import apply
from memsvc.core.reuse import ReuseTrace
from memsvc.core.table import TableRecord
from quire import hashing, media
from quire.memory import Admission, AdmitRequest, Fork, ForkRequest
from quire.units import div_ceil

_TOKEN_BYTES = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Traffic:
    """What requests that use the cache asked for since the log begins, each request counted once.

    Attributes:
        trace: their blocks.
        asked_token_count: tokens that they had.
        found_token_count: those that the pool had cached.
        begins_at: time of the first command that the log has, None if there is none.
    """

    trace: ReuseTrace
    asked_token_count: int
    found_token_count: int
    begins_at: float | None


@dataclasses.dataclass(slots=True)
class _Closing:
    """A table that a command closes, as it was before."""

    record: TableRecord
    slot: int


def read_traffic(
    segments: Sequence[Segment], pool_id: str, block_size: int, breathe: Callable[[], None] = lambda: None
) -> Traffic:
    """Returns the traffic of a pool, in blocks of `block_size` tokens, whatever its own have.

    The log is replayed: what sequences left behind is in it, their completions included. Tables that were open when it
    begins are left out.

    Args:
        segments: consecutive parts of a log; commands that come meanwhile are left out.
        pool_id: the pool, without a sliding window.
        block_size: tokens in a block.
        breathe: called between commands, so that others may run meanwhile.

    Raises:
        CorruptionError: the log does not fit itself.
    """
    reader = _Reader(pool_id, block_size)
    lengths = [len(segment.lines) for segment in segments]
    if segments:
        core = snapshot.clone(segments[0].base)
        core.roots = segments[0].base.roots
        for segment, length in zip(segments, lengths, strict=True):
            for entry in segment.entries(stop=length):
                reader.read(core, entry)
                breathe()
    return Traffic(reader.trace, reader.asked, reader.found, begins_at(segments))


class _Reader:
    """Follows one pool through a replay."""

    def __init__(self, pool_id: str, block_size: int) -> None:
        self.trace = ReuseTrace()
        self.asked = self.found = 0
        self._pool_id = pool_id
        self._block_size = block_size
        self._memory: PoolMemory | None = None
        # Of each open table, the request that it began with.
        self._requests: dict[int, AdmitRequest] = {}

    def read(self, core: MemoryCore, entry: Entry) -> None:
        """Runs one entry and notes what it touches."""
        if entry.command == ROOT:
            apply(core, entry)
            return
        pool = core.pools.get(self._pool_id)
        memory = pool.memory if pool is not None else None
        if memory is not self._memory:
            # Another epoch: whatever was cached is gone.
            self._memory = memory
            self._requests.clear()
            self.trace.forget()
        closing = self._closing(memory, entry) if entry.command == "journal" and memory is not None else []
        result = apply(core, entry)
        if entry.command == "reset_cache" and self._argument(entry, "pool_id") == self._pool_id:
            self.trace.forget()
        elif isinstance(result, Admission):
            self._admitted(self._argument(entry, "request"), result)
        elif isinstance(result, Fork):
            self._forked(self._argument(entry, "request"), result)
        if memory is not None:
            for one in closing:
                self._closed(memory, one)

    @staticmethod
    def _argument(entry: Entry, name: str) -> Any:
        return COMMANDS[entry.command].argument(name, entry.args, entry.kwargs)

    def _closing(self, memory: PoolMemory, entry: Entry) -> list[_Closing]:
        """Returns the tables that a journal closes."""
        journal = self._argument(entry, "journal")
        if self._argument(entry, "pool_id") != self._pool_id or not len(journal.closed):
            return []
        known = [table for table in journal.columns().closed.tolist() if table in self._requests]
        slots = [slot for slot in map(memory.tables.slot, known) if slot >= 0]
        return [_Closing(memory.tables.record(slot), slot) for slot in slots]

    def _admitted(self, request: AdmitRequest, admission: Admission) -> None:
        if request.pool_id != self._pool_id or request.skip_cache_write:
            return
        self._requests[admission.table] = request
        identities = self._identities(request, request.token_ids)
        if request.resumed or request.skip_cache_read:
            self.trace.touch(identities)
            return
        count = len(request.token_ids) // _TOKEN_BYTES
        self.asked += count
        self.found += admission.cached_token_count
        # One token is left to compute: a last block that is full is not asked for as a whole.
        asked = (count - 1) // self._block_size
        self.trace.ask(identities[:asked])
        self.trace.touch(identities[asked:])

    def _forked(self, request: ForkRequest, forked: Fork) -> None:
        source = self._requests.get(request.table) if request.pool_id == self._pool_id else None
        if source is not None:
            self._requests.update(dict.fromkeys(forked.tables, source))

    def _closed(self, memory: PoolMemory, one: _Closing) -> None:
        """Notes what a closed table leaves behind: columns and blocks are as it left them until the next command."""
        if memory.tables.slot(one.record.table) >= 0:
            return
        request = self._requests.pop(one.record.table)
        written = int(memory.tables.written[one.slot])
        blocks = np.frombuffer(one.record.blocks, np.int64, div_ceil(written, memory.spec.block_size))
        tokens = memory.prefix.tokens[blocks].tobytes()[: written * _TOKEN_BYTES]
        # As a pool lets go of them: what is at the end is evicted first.
        self.trace.touch(self._identities(request, tokens)[::-1])

    def _identities(self, request: AdmitRequest, tokens: bytes) -> list[bytes]:
        """Returns the identities of full blocks; they need no secret, since nobody sees them."""
        size = self._block_size
        root = hashing.PrefixRoot("", size, "", request.adapter, request.tenant.encode(), request.cache_salt).digest()
        extras = media.block_extras(request.media, size) if request.media else {}
        return hashing.chain_with(root, tokens, size, 0, extras) if extras else hashing.chain(root, tokens, size)
