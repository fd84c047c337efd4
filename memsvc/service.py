"""`MemoryService`: what executors and gateways call. Translates only."""

from __future__ import annotations

from collections.abc import AsyncIterator
import contextlib
from typing import Any

import grpc

from memsvc import translate
from memsvc.keeper import Keeper
from memsvc.session import Session
from memsvc.sharing.locate import Locator
from protos.memsvc.v1 import memsvc_pb2, memsvc_pb2_grpc


class MemoryServicer(memsvc_pb2_grpc.MemoryServiceServicer):
    """Serves the memory service.

    Args:
        keeper: the owner of the core.
        locator: finds prompts.
    """

    def __init__(self, keeper: Keeper, locator: Locator) -> None:
        self._keeper = keeper
        self._locator = locator

    async def RegisterPool(
        self, request: memsvc_pb2.RegisterPoolRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> memsvc_pb2.RegisterPoolResponse:
        """Registers an executor's pool."""
        config = self._keeper.config
        epoch = await self._keeper.register_pool(translate.to_registration(request), request.epoch_floor)
        return memsvc_pb2.RegisterPoolResponse(
            pool_id=request.executor_id,
            epoch=epoch,
            heartbeat_interval=translate.to_duration(config.heartbeat_interval),
            lease_ttl=translate.to_duration(config.lease_ttl),
        )

    async def Heartbeat(
        self, request: memsvc_pb2.HeartbeatRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> memsvc_pb2.HeartbeatResponse:
        """Keeps a pool alive."""
        return memsvc_pb2.HeartbeatResponse(
            epoch=self._keeper.heartbeat(request.executor_id, request.executor_incarnation)
        )

    async def Connect(
        self,
        request_iterator: AsyncIterator[memsvc_pb2.ConnectRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[memsvc_pb2.ConnectResponse]:
        """Serves one gateway for as long as its stream is open."""
        async with contextlib.aclosing(Session(self._keeper).run(aiter(request_iterator))) as responses:
            async for response in responses:
                yield response

    async def Locate(
        self, request: memsvc_pb2.LocateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> memsvc_pb2.LocateResponse:
        """Finds which pools hold the beginning of a prompt."""
        return translate.from_located(await self._locator.locate(translate.to_query(request)))
