"""`Publisher`: carries the cache events of one pool to one sink, without ever making anyone wait.

    IDLE ── offer ──> queue ── write ──> sink
      └── overflow, failure, fence ──> gap ── begin with a snapshot ──> IDLE

What does not fit the queue is not dropped one by one: the queue is given up as a whole, which is a gap, and a gap ends
with a snapshot of everything. So the copy in the store is either exact or known not to be.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
import contextlib
import dataclasses
import time

import structlog

from memsvc.core.events import BlocksStored, CacheEvent
from memsvc.sharing.records import rows_of
from memsvc.sharing.sinks import Sink
from memsvc.store.base import StoreFencedError
from quire.errors import StoreUnavailableError

log = structlog.get_logger(__name__)

_BACKOFF_MINIMUM_SECONDS = 0.05
_BACKOFF_MAXIMUM_SECONDS = 2.0
_END_SECONDS = 2.0


@dataclasses.dataclass(slots=True)
class PublisherStatistics:
    """Counts since the start."""

    written_block_count: int = 0
    """Rows of events that were written."""
    snapshot_count: int = 0
    """Times that everything was written."""
    overflow_count: int = 0
    """Gaps because the queue was full."""
    fence_count: int = 0
    """Gaps because the store did not hold what was left there."""
    failure_count: int = 0
    """Gaps because the store did not answer."""


class Publisher:
    """Owns one task that writes to one sink.

    Args:
        pool_id: for the log.
        sink: where to.
        snapshot: returns everything published; every event offered before is part of it.
        queue_limit: most blocks that may wait.
        renew_interval: seconds between renewals.
    """

    def __init__(
        self,
        pool_id: str,
        sink: Sink,
        snapshot: Callable[[], BlocksStored],
        *,
        queue_limit: int,
        renew_interval: float,
    ) -> None:
        self.statistics = PublisherStatistics()
        self._pool_id = pool_id
        self._sink = sink
        self._snapshot = snapshot
        self._queue_limit = queue_limit
        self._renew_interval = renew_interval
        self._queue: deque[CacheEvent] = deque()
        self._queued_rows = 0
        self._gap = True
        self._gap_reported = False
        self._writing = False
        self._closing = False
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts to write, a snapshot first."""
        self._task = asyncio.create_task(self._run(), name=f"publish-{self._sink.name}-{self._pool_id}")

    @property
    def sink_name(self) -> str:
        """What the sink is."""
        return self._sink.name

    @property
    def is_exact(self) -> bool:
        """Whether the sink has everything that was offered."""
        return not (self._gap or self._queue or self._writing)

    async def settle(self) -> None:
        """Waits until the sink has everything that was offered."""
        while not self.is_exact:
            self._settled.clear()
            await self._settled.wait()

    def offer(self, events: list[CacheEvent]) -> None:
        """Queues events. In a gap they are dropped, since the snapshot that ends it will hold them."""
        if self._gap:
            return
        rows = rows_of(events)
        if self._queued_rows + rows > self._queue_limit:
            self.statistics.overflow_count += 1
            self._begin_gap("store_tail_overflowed", waiting_block_count=self._queued_rows + rows)
        else:
            self._queue.extend(events)
            self._queued_rows += rows
        self._wake.set()

    async def close(self, *, end: bool) -> None:
        """Stops; with `end` the sink's copy is removed, if that can be done soon."""
        # A cancellation that meets the end of what it cancels may be lost in a client library: then this ends the loop.
        self._closing = True
        self._wake.set()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if end:
            with contextlib.suppress(StoreUnavailableError, TimeoutError):
                # What is not removed expires by itself.
                await asyncio.wait_for(self._sink.end(), _END_SECONDS)

    def _begin_gap(self, event: str, **fields: object) -> None:
        """Gives up the queue; what is in the sink counts for nothing until a snapshot is."""
        if not self._gap_reported:
            self._gap_reported = True
            log.warning(event, pool_id=self._pool_id, sink=self._sink.name, effect="a snapshot follows", **fields)
        self._gap = True
        self._queue.clear()
        self._queued_rows = 0

    async def _run(self) -> None:
        """Writes until it is closed."""
        backoff = _BACKOFF_MINIMUM_SECONDS
        renew_at = 0.0
        while not self._closing:
            try:
                self._writing = True
                if self._gap:
                    await self._begin()
                    renew_at = time.monotonic() + self._renew_interval
                await self._write()
                if time.monotonic() >= renew_at:
                    await self._sink.renew()
                    renew_at = time.monotonic() + self._renew_interval
                backoff = _BACKOFF_MINIMUM_SECONDS
            except StoreFencedError as error:
                self.statistics.fence_count += 1
                self._begin_gap("store_tail_fenced", reason=error.message)
            except StoreUnavailableError as error:
                self.statistics.failure_count += 1
                self._begin_gap("store_tail_interrupted", reason=error.message)
            except Exception:
                log.exception("store_tail_failed", pool_id=self._pool_id, sink=self._sink.name)
                self.statistics.failure_count += 1
                self._begin_gap("store_tail_interrupted", reason="internal error")
            finally:
                self._writing = False
            if self._closing:
                return
            if self._gap:
                await asyncio.sleep(backoff)
                backoff = min(2 * backoff, _BACKOFF_MAXIMUM_SECONDS)
            elif not self._queue:
                self._settled.set()
                await self._wait(renew_at)

    async def _begin(self) -> None:
        """Ends the gap with a snapshot."""
        published = self._snapshot()
        # From here on events count again: they happened after the snapshot.
        self._gap = False
        await self._sink.begin(published)
        self.statistics.snapshot_count += 1
        if self._gap_reported and not self._gap:
            self._gap_reported = False
            log.info(
                "store_tail_resumed", pool_id=self._pool_id, sink=self._sink.name, block_count=len(published.blocks)
            )

    async def _write(self) -> None:
        """Writes what is queued."""
        while self._queue and not self._gap:
            events, rows = list(self._queue), self._queued_rows
            self._queue.clear()
            self._queued_rows = 0
            await self._sink.write(events)
            self.statistics.written_block_count += rows
        if not self._gap and self._sink.wants_checkpoint():
            await self._checkpoint()

    async def _checkpoint(self) -> None:
        """Replaces what the sink has by a snapshot of this instant."""
        published = self._snapshot()
        if self._gap:
            return
        events = list(self._queue)
        self._queue.clear()
        self._queued_rows = 0
        await self._sink.write(events)
        await self._sink.checkpoint(published)
        self.statistics.snapshot_count += 1

    async def _wait(self, renew_at: float) -> None:
        """Waits for events, or for the next renewal."""
        self._wake.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, renew_at - time.monotonic())):
                await self._wake.wait()
