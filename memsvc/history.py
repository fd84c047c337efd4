"""Answers from the command log, beside the event loop: a replay may take a second."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
import dataclasses
import threading
import time
from typing import Final, Protocol, TypeVar

from memsvc.core.history import Everything, HistoryRecord, Watch, begins_at, history
from memsvc.core.history_watches import watch_block, watch_sequence
from memsvc.core.log import CommandLog, Segment
from memsvc.core.memory import MemoryCore
from memsvc.core.traffic import Traffic, read_traffic
from quire.errors import InvalidRequestError, RequestCancelledError, UnsupportedError

_INDEX_BITS: Final = 20

T = TypeVar("T")


class LogKeeper(Protocol):
    """Who has the core and its log."""

    core: MemoryCore
    log: CommandLog | None


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """What is asked; see `quire.memsvc.v1.HistoryRequest`.

    Attributes:
        pool_id: only this pool; empty for all.
        block_id: only this block; 0 for none.
        sequence_id: only this sequence; empty for none.
        after: cursor of the last record that is known; -1 for the beginning.
        limit: most records.
    """

    pool_id: str
    block_id: int
    sequence_id: str
    after: int
    limit: int


@dataclasses.dataclass(frozen=True, slots=True)
class Told:
    """An answer.

    Attributes:
        records: what happened, oldest first.
        cursor: where the next page begins; -1 if there is none.
        begins_at: time of the first command that the log has, in seconds of the caller's clock; None if there is none.
    """

    records: list[HistoryRecord]
    cursor: int
    begins_at: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Simulated:
    """What the traffic of a pool would have found elsewhere.

    Attributes:
        traffic: what was asked for, and found.
        found_token_counts: tokens that pools of the sizes asked about would have found.
        endless_token_count: tokens that a pool without an end would have found.
    """

    traffic: Traffic
    found_token_counts: list[int]
    endless_token_count: int


class Historian:
    """Answers questions one at a time.

    Args:
        keeper: who has the core and its log.
    """

    def __init__(self, keeper: LogKeeper) -> None:
        self._keeper = keeper
        self._one = asyncio.Lock()

    async def tell(self, question: Question) -> Told:
        """Returns what happened.

        Raises:
            InvalidRequestError, PoolNotFoundError, BlockNotFoundError, SequenceNotFoundError: what is asked for cannot
                be, or is not known.
            UnsupportedError: no log is kept.
        """
        if question.sequence_id and (question.pool_id or question.block_id):
            raise InvalidRequestError("sequence_id: not together with pool_id or block_id", field="sequence_id")
        if question.block_id and not question.pool_id:
            raise InvalidRequestError("pool_id: is empty, but block_id is not", field="pool_id")
        if question.pool_id and not question.block_id:
            self._keeper.core.pool(question.pool_id)
        log = self._log()
        block = watch_block(self._keeper.core, question.pool_id, question.block_id) if question.block_id else None
        return await self._over(log, lambda segments, breathe: _tell(segments, question, block, breathe))

    async def simulate(self, pool_id: str, block_size: int, block_counts: Sequence[int]) -> Simulated:
        """Returns what the traffic of a pool would have found in others, as far back as the log goes.

        Args:
            pool_id: the pool.
            block_size: tokens in a block of the others.
            block_counts: blocks of each of the others.

        Raises:
            PoolNotFoundError: no such pool.
            UnsupportedError: no log is kept, or the pool's model attends over a sliding window.
        """
        if self._keeper.core.pool(pool_id).registration.spec.window:
            message = f"pool {pool_id!r} keeps the windows of its sequences: what it finds is not one run of blocks"
            raise UnsupportedError(message, reason="SLIDING_WINDOW")

        def simulate(segments: Sequence[Segment], breathe: Callable[[], None]) -> Simulated:
            traffic = read_traffic(segments, pool_id, block_size, breathe)
            shares, endless = traffic.trace.found(block_counts)
            asked = traffic.trace.asked_block_count * block_size
            return Simulated(traffic, [round(share * asked) for share in shares], round(endless * asked))

        return await self._over(self._log(), simulate)

    def _log(self) -> CommandLog:
        """Returns the log; raises UnsupportedError if none is kept."""
        log = self._keeper.log
        if log is None or log.ended:
            message = "no command log is kept: --command-log-mib is 0, or too small for the pools"
            raise UnsupportedError(message, reason="NO_COMMAND_LOG")
        return log

    async def _over(self, log: CommandLog, work: Callable[[Sequence[Segment], Callable[[], None]], T]) -> T:
        """Returns what `work` makes of a log, in a thread; it is to call the function that it is given often."""
        stopped = threading.Event()

        def breathe() -> None:
            # The event loop has the interpreter whenever it wants it.
            time.sleep(0)
            if stopped.is_set():
                raise RequestCancelledError("nobody waits for this answer any more")

        async with self._one:
            reader, segments = log.read()

            def run() -> T:
                try:
                    return work(segments, breathe)
                finally:
                    log.done(reader, segments)

            try:
                return await asyncio.to_thread(run)
            finally:
                # Who asked may be gone; the thread is told to stop.
                stopped.set()


def _tell(segments: Sequence[Segment], question: Question, block: Watch | None, breathe: Callable[[], None]) -> Told:
    """Replays the log; runs in a thread, on copies."""
    watch: Watch = Everything()
    if block is not None:
        watch = block
    elif question.sequence_id:
        watch = watch_sequence(segments, question.sequence_id)
    records: list[HistoryRecord] = []
    cursor, place, index = -1, -1, 0
    for record in history(segments, watch, breathe):
        index = index + 1 if record.place == place else 0
        place = record.place
        at = place << _INDEX_BITS | index
        if at <= question.after or (question.pool_id and block is None and record.pool_id != question.pool_id):
            continue
        if len(records) == question.limit:
            return Told(records, cursor, begins_at(segments))
        records.append(record)
        cursor = at
    return Told(records, -1, begins_at(segments))
