"""Tells executors which gateways are gone, again and again until they have answered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
import structlog

from memsvc.core.lease import FenceRequired
from protos.execsvc.v1 import execsvc_pb2, execsvc_pb2_grpc
from quire.rpc import open_channel

log = structlog.get_logger(__name__)

_BACKOFF_MINIMUM_SECONDS = 0.05
_BACKOFF_MAXIMUM_SECONDS = 1.0


class Fencer:
    """Sends fences: one call at a time for each pool, several gateways in one call.

    Args:
        timeout: seconds that one call may take.
        is_due: whether a fence still matters; it does not when the pool's epoch is over.
        done: called with each fence that was answered.
    """

    def __init__(
        self,
        timeout: float,
        is_due: Callable[[FenceRequired], bool],
        done: Callable[[FenceRequired], None],
    ) -> None:
        self._timeout = timeout
        self._is_due = is_due
        self._done = done
        self._waiting: dict[str, list[FenceRequired]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def add(self, fence: FenceRequired) -> None:
        """Sends a fence as soon as may be. The list is bounded by the gateways that hold blocks."""
        self._waiting.setdefault(fence.pool_id, []).append(fence)
        if fence.pool_id not in self._tasks:
            self._tasks[fence.pool_id] = asyncio.create_task(self._serve(fence.pool_id), name=f"fence-{fence.pool_id}")

    async def close(self) -> None:
        """Stops. Fences not answered are left to the next start: it raises every epoch."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, pool_id: str) -> None:
        """Sends the fences of one pool until there are none."""
        try:
            backoff, failed = _BACKOFF_MINIMUM_SECONDS, False
            while fences := self._due(pool_id):
                try:
                    await self._call(fences)
                except grpc.aio.AioRpcError as error:
                    if not failed:
                        log.warning(
                            "fence_failed",
                            pool_id=pool_id,
                            executor_address=fences[0].executor_address,
                            status=error.code().name,
                            effect="its blocks stay pending until it answers or is lost",
                        )
                    failed = True
                    await asyncio.sleep(backoff)
                    backoff = min(2 * backoff, _BACKOFF_MAXIMUM_SECONDS)
                    continue
                waiting = self._waiting[pool_id]
                self._waiting[pool_id] = [fence for fence in waiting if fence not in fences]
                backoff, failed = _BACKOFF_MINIMUM_SECONDS, False
                for fence in fences:
                    self._done(fence)
        finally:
            del self._tasks[pool_id]
            self._waiting.pop(pool_id, None)

    def _due(self, pool_id: str) -> list[FenceRequired]:
        """Returns the fences that still matter, of the newest address."""
        due = [fence for fence in self._waiting[pool_id] if self._is_due(fence)]
        self._waiting[pool_id] = due
        return list(due)

    async def _call(self, fences: list[FenceRequired]) -> None:
        """Sends one call."""
        request = execsvc_pb2.FenceRequest(gateway_incarnations=[fence.gateway_incarnation for fence in fences])
        async with open_channel(fences[0].executor_address) as channel:
            await execsvc_pb2_grpc.ExecutorServiceStub(channel).Fence(request, timeout=self._timeout)
        log.info("gateways_fenced", pool_id=fences[0].pool_id, gateway_count=len(fences))
