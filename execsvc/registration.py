"""Keeps the executor's pool registered with memsvc."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import grpc
import structlog

from execsvc import events
from execsvc.executor import Executor
from protos.memsvc.v1 import memsvc_pb2 as pb
from protos.memsvc.v1 import memsvc_pb2_grpc
from quire import status
from quire.errors import PoolNotFoundError, StaleEpochError
from quire.rpc import open_channel

log = structlog.get_logger(__name__)

_CALL_SECONDS = 5.0
_FIRST_BACKOFF, _MAX_BACKOFF = 0.2, 2.0
_RETRIED = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
}


class Registration:
    """Registers the pool, then sends heartbeats; registers again when memsvc has forgotten it.

    Args:
        executor: whose pool; it is told each epoch.
        memsvc: host:port.
        address: host:port where gateways reach the executor.
        on_registered: awaited after each registration.
    """

    def __init__(
        self, executor: Executor, memsvc: str, address: str, on_registered: Callable[[], Awaitable[None]]
    ) -> None:
        self._executor = executor
        self._memsvc = memsvc
        self._address = address
        self._on_registered = on_registered

    async def run(self) -> None:
        """Runs until cancelled.

        Raises:
            StaleEpochError: a newer incarnation of this executor has taken over.
            QuireError: memsvc refuses the pool for good.
        """
        async with open_channel(self._memsvc) as channel:
            stub = memsvc_pb2_grpc.MemoryServiceStub(channel)
            while True:
                interval = await self._register(stub)
                await self._keep_alive(stub, interval)

    async def _register(self, stub: memsvc_pb2_grpc.MemoryServiceAsyncStub) -> float:
        """Registers, however long it takes; returns the heartbeat interval in seconds."""
        backoff, complained = _FIRST_BACKOFF, False
        while True:
            request = pb.RegisterPoolRequest(
                executor_id=self._executor.executor_id,
                executor_incarnation=self._executor.incarnation,
                address=self._address,
                spec=self._executor.pool_spec(),
                epoch_floor=self._executor.epoch,
            )
            try:
                response = await stub.RegisterPool(request, timeout=_CALL_SECONDS)
            except grpc.aio.AioRpcError as error:
                if error.code() not in _RETRIED:
                    raise status.from_rpc_error(error) from error
                if not complained:
                    complained = True
                    log.warning(
                        events.MEMSVC_UNREACHABLE, memsvc=self._memsvc, code=error.code().name,
                        advice="start memsvc or correct --memsvc; retrying",
                    )  # fmt: skip
                await asyncio.sleep(backoff)
                backoff = min(2 * backoff, _MAX_BACKOFF)
                continue
            await self._executor.begin_epoch(response.epoch)
            log.info(events.POOL_REGISTERED, pool_id=response.pool_id, epoch=response.epoch, address=self._address)
            await self._on_registered()
            return response.heartbeat_interval.ToNanoseconds() / 1e9 or 0.5

    async def _keep_alive(self, stub: memsvc_pb2_grpc.MemoryServiceAsyncStub, interval: float) -> None:
        """Sends heartbeats until memsvc does not know the pool any more."""
        complained = False
        request = pb.HeartbeatRequest(
            executor_id=self._executor.executor_id, executor_incarnation=self._executor.incarnation
        )
        while True:
            await asyncio.sleep(interval)
            try:
                response = await stub.Heartbeat(request, timeout=_CALL_SECONDS)
            except grpc.aio.AioRpcError as error:
                found = status.from_rpc_error(error)
                if error.code() == grpc.StatusCode.NOT_FOUND or isinstance(found, PoolNotFoundError):
                    return
                if error.code() == grpc.StatusCode.ABORTED:
                    raise StaleEpochError(f"a newer incarnation of this executor has taken over: {found}") from error
                if error.code() not in _RETRIED:
                    raise found from error
                if not complained:
                    complained = True
                    log.warning(
                        events.MEMSVC_UNREACHABLE, memsvc=self._memsvc, code=error.code().name,
                        advice="steps go on; heartbeats are retried",
                    )  # fmt: skip
                continue
            complained = False
            if response.epoch > self._executor.epoch:
                await self._executor.begin_epoch(response.epoch)
