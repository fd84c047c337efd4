"""Answers what happened, from the command log, beside the event loop: a replay may take a second."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
import dataclasses
import threading
import time
from typing import Final, Protocol

from memsvc.core.commands import COMMANDS
from memsvc.core.history import Everything, HistoryRecord, Watch, history
from memsvc.core.history_watches import watch_block, watch_sequence
from memsvc.core.log import CommandLog, Segment
from memsvc.core.memory import MemoryCore
from quire.errors import InvalidRequestError, RequestCancelledError, UnsupportedError

_INDEX_BITS: Final = 20


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
        log = self._keeper.log
        if question.sequence_id and (question.pool_id or question.block_id):
            raise InvalidRequestError("sequence_id: not together with pool_id or block_id", field="sequence_id")
        if question.block_id and not question.pool_id:
            raise InvalidRequestError("pool_id: is empty, but block_id is not", field="pool_id")
        if question.pool_id and not question.block_id:
            self._keeper.core.pool(question.pool_id)
        if log is None or log.ended:
            message = "no command log is kept: --command-log-mib is 0, or too small for the pools"
            raise UnsupportedError(message, reason="NO_COMMAND_LOG")
        block = watch_block(self._keeper.core, question.pool_id, question.block_id) if question.block_id else None
        stopped = threading.Event()
        async with self._one:
            reader, segments = log.read()

            def tell() -> Told:
                try:
                    return _tell(segments, question, block, stopped.is_set)
                finally:
                    log.done(reader, segments)

            try:
                return await asyncio.to_thread(tell)
            finally:
                # Who asked may be gone; the thread is told to stop.
                stopped.set()


def _tell(segments: Sequence[Segment], question: Question, block: Watch | None, is_stopped: Callable[[], bool]) -> Told:
    """Replays the log; runs in a thread, on copies."""

    def breathe() -> None:
        # The event loop has the interpreter whenever it wants it.
        time.sleep(0)
        if is_stopped():
            raise RequestCancelledError("nobody waits for this history any more")

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
            return Told(records, cursor, _begins_at(segments))
        records.append(record)
        cursor = at
    return Told(records, -1, _begins_at(segments))


def _begins_at(segments: Sequence[Segment]) -> float | None:
    """Returns the time of the first command that has one."""
    for segment in segments:
        for entry in segment.entries(stop=len(segment.lines)):
            spec = COMMANDS.get(entry.command)
            at: float | None = spec.argument("now", entry.args, entry.kwargs) if spec is not None else None
            if at is not None:
                return at
    return None
