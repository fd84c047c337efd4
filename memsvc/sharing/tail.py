"""`Tail`: has what the pools of a core cache written to the store, behind the core's back.

The keeper only says that something may have happened. A few milliseconds later all events are taken from the core and
offered to the publishers of their pool, one for the journal and one for the hints, which write them in their own time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
import dataclasses

from memsvc.core.events import BlocksStored
from memsvc.core.memory import MemoryCore
from memsvc.core.registered import RegisteredPool
from memsvc.sharing.publisher import Publisher, PublisherStatistics
from memsvc.sharing.sinks import HintSink, JournalSink
from memsvc.store.base import HintOwner, HintSpace, ServiceRecord, Store

_COLLECT_SECONDS = 0.005
_RENEWALS_PER_TTL = 3


@dataclasses.dataclass(slots=True)
class _Feed:
    """One epoch of a pool that is ready."""

    epoch: int
    publishers: list[Publisher]


class Tail:
    """Follows every pool of a core.

    Args:
        core: made with `cache_events`.
        store: where to write.
        lease_ttl: seconds after which hints vanish when this process does.
        queue_limit: most blocks that may wait for the store, for each pool and sink.
    """

    def __init__(self, core: MemoryCore, store: Store, *, lease_ttl: float, queue_limit: int) -> None:
        self._core = core
        self._store = store
        self._lease_ttl = lease_ttl
        self._queue_limit = queue_limit
        self._service: ServiceRecord | None = None
        self._feeds: dict[str, _Feed] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()

    def start(self, service: ServiceRecord) -> None:
        """Starts to write on behalf of `service`."""
        self._service = service
        self.notify()

    def notify(self) -> None:
        """Says that the core may have events. Costs nothing, and waits for nothing."""
        if self._timer is None and self._service is not None:
            self._timer = asyncio.get_running_loop().call_later(_COLLECT_SECONDS, self._collect)

    async def close(self) -> None:
        """Stops, and withdraws everything: nothing leads to this process any more."""
        self._service = None
        if self._timer is not None:
            self._timer.cancel()
        for pool_id in list(self._feeds):
            self._end(pool_id)
        await asyncio.gather(*self._closing, return_exceptions=True)

    async def settle(self) -> None:
        """Waits until the store has everything that the core has published by now."""
        self._collect()
        for feed in list(self._feeds.values()):
            for publisher in feed.publishers:
                await publisher.settle()

    def statistics(self) -> dict[str, dict[str, PublisherStatistics]]:
        """Returns the counts of each pool's publishers, by sink."""
        return {
            pool_id: {publisher.sink_name: publisher.statistics for publisher in feed.publishers}
            for pool_id, feed in self._feeds.items()
        }

    def _collect(self) -> None:
        """Hands all events on."""
        self._timer = None
        for pool_id, pool in self._core.pools.items():
            self._collect_pool(pool_id, pool)

    def _collect_pool(self, pool_id: str, pool: RegisteredPool) -> None:
        events = self._core.take_cache_events(pool_id)
        feed = self._feeds.get(pool_id)
        if feed is not None and (feed.epoch != pool.epoch or not pool.ready):
            self._end(pool_id)
            feed = None
        if feed is None and pool.ready and self._service is not None:
            # What was taken is part of the snapshot that the publishers begin with.
            self._begin(pool_id, pool, self._service)
        elif feed is not None and events:
            for publisher in feed.publishers:
                publisher.offer(events)

    def _begin(self, pool_id: str, pool: RegisteredPool, service: ServiceRecord) -> None:
        spec, registration = pool.registration.spec, pool.registration
        owner = HintOwner(
            pool_id,
            registration.executor_incarnation,
            registration.address,
            service.name,
            service.nonce,
            service.address,
        )
        space = HintSpace(spec.model_id, spec.block_size, spec.kv_dtype)
        sinks = (
            JournalSink(self._store.journals, pool_id, pool.epoch),
            HintSink(self._store.hints, space, owner, spec.block_count, self._lease_ttl),
        )
        publishers = [
            Publisher(
                pool_id,
                sink,
                self._snapshot_of(pool_id, pool),
                queue_limit=self._queue_limit,
                renew_interval=self._lease_ttl / _RENEWALS_PER_TTL,
            )
            for sink in sinks
        ]
        self._feeds[pool_id] = _Feed(pool.epoch, publishers)
        for publisher in publishers:
            publisher.start()

    def _snapshot_of(self, pool_id: str, pool: RegisteredPool) -> Callable[[], BlocksStored]:
        def take() -> BlocksStored:
            self._collect_pool(pool_id, self._core.pools[pool_id])
            # Of the memory of this epoch, even if another has begun meanwhile: this feed has ended then.
            return memory.published(with_tokens=False)

        memory = pool.memory
        return take

    def _end(self, pool_id: str) -> None:
        """Ends a feed; its copies are removed in the background."""
        for publisher in self._feeds.pop(pool_id).publishers:
            task = asyncio.create_task(publisher.close(end=True), name=f"withdraw-{pool_id}")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
