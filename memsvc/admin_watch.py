"""The part of `AdminService` that streams: what changes in a pool, as it changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
import itertools
import sys
from typing import Any, Final

import grpc

from memsvc.core import views
from memsvc.core.memory import MemoryCore
from memsvc.keeper import Keeper
from memsvc.summaries import from_pool, from_sequence
from protos.memsvc.v1 import admin_pb2
from quire.errors import AdmissionError, InvalidRequestError

WATCHERS: Final = 16
"""Most calls at once: each looks at every open sequence at each of its moments."""
_INTERVAL_DEFAULT, _INTERVAL_MINIMUM, _INTERVAL_MAXIMUM = 1.0, 0.1, 60.0
_CHUNK: Final = 1000
_ENDLESS: Final = sys.maxsize


class PoolDifference:
    """What was told of a pool, and so what there is to tell."""

    def __init__(self, pool_id: str) -> None:
        """Has told nothing of the pool yet."""
        self._pool_id = pool_id
        self._pool = b""
        self._told: dict[int, tuple[int, ...]] = {}

    def take(self, core: MemoryCore, now: float) -> list[admin_pb2.WatchPoolResponse]:
        """Returns what has changed since the last call; nothing if nothing has.

        Raises:
            PoolNotFoundError: the pool is not there.
        """
        pool = from_pool(views.view_pool(core, self._pool_id))
        found = {view.record.ordinal: view for view in views.list_sequences(core, self._pool_id, -1, _ENDLESS)}
        facts = {ordinal: _facts(view) for ordinal, view in found.items()}
        gone = self._told.keys() - facts.keys()
        changed = [ordinal for ordinal, fact in facts.items() if self._told.get(ordinal) != fact]
        serialized = pool.SerializeToString(deterministic=True)
        if not gone and not changed and serialized == self._pool:
            return []
        self._told, self._pool = facts, serialized
        messages = [
            admin_pb2.WatchPoolResponse(sequences=[from_sequence(found[ordinal], now) for ordinal in part])
            for part in _chunks(changed)
        ]
        messages += [admin_pb2.WatchPoolResponse(gone_ordinals=part) for part in _chunks(sorted(gone))]
        if not messages:
            messages.append(admin_pb2.WatchPoolResponse())
        messages[-1].pool.CopyFrom(pool)
        return messages


def _facts(view: views.SequenceView) -> tuple[int, ...]:
    """Returns what of a sequence can change."""
    return (
        int(view.record.state),
        view.token_count,
        view.written_token_count,
        view.committed_token_count,
        view.block_count,
    )


def _chunks(ordinals: list[int]) -> Iterator[tuple[int, ...]]:
    """Yields runs of at most a message's worth."""
    ordered = iter(ordinals)
    while part := tuple(itertools.islice(ordered, _CHUNK)):
        yield part


class WatchCommands:
    """Watching a pool."""

    _keeper: Keeper
    _watcher_count: int

    async def WatchPool(
        self, request: admin_pb2.WatchPoolRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[admin_pb2.WatchPoolResponse]:
        """Streams what happens in a pool."""
        interval = _interval(request)
        if self._watcher_count >= WATCHERS:
            message = f"WatchPool: {self._watcher_count} calls watch already, allowed are {WATCHERS}"
            raise AdmissionError(message, reason="TOO_MANY_WATCHERS", retry_after=interval)
        self._watcher_count += 1
        try:
            difference = PoolDifference(request.pool_id)
            while True:
                for response in difference.take(self._keeper.core, self._keeper.now):
                    yield response
                await asyncio.sleep(interval)
        finally:
            self._watcher_count -= 1


def _interval(request: admin_pb2.WatchPoolRequest) -> float:
    """Returns the seconds between two moments; raises InvalidRequestError."""
    if not request.HasField("min_interval"):
        return _INTERVAL_DEFAULT
    seconds = request.min_interval.seconds + request.min_interval.nanos / 1e9
    if not _INTERVAL_MINIMUM <= seconds <= _INTERVAL_MAXIMUM:
        allowed = f"{_INTERVAL_MINIMUM:g} s .. {_INTERVAL_MAXIMUM:g} s"
        raise InvalidRequestError(f"min_interval: found {seconds:g} s, allowed is {allowed}", field="min_interval")
    return seconds
