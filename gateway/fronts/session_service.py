"""SessionService of a front: turns are answered here, the table of sessions is the engine's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, TypeVar

from gateway.session_service import Context, SessionService
from gateway.tenants import tenant_of
from protos.gateway.v1 import session_pb2 as pb
from protos.gateway.v1 import session_pb2_grpc

if TYPE_CHECKING:
    import grpc

    from gateway.config import GatewayConfig
    from gateway.fronts.remote_engine import RemoteEngine

Response = TypeVar("Response")

_CALL_SECONDS: Final = 10.0


class FrontSessionService(SessionService):
    """Sessions of all fronts.

    Args:
        engine: of the gateway.
        config: limits.
        channel: to the engine, which serves the same service.
    """

    def __init__(self, engine: RemoteEngine, config: GatewayConfig, channel: grpc.aio.Channel) -> None:
        super().__init__(engine, config, engine)
        self._remote = engine
        self._stub = session_pb2_grpc.SessionServiceStub(channel)

    async def _forward(self, method: Callable[..., Awaitable[Response]], request: object, context: Context) -> Response:
        tenant = tenant_of(context, self._config.tenant_metadata)
        return await self._remote.forward(method, request, tenant, _CALL_SECONDS)

    async def CreateSession(self, request: pb.CreateSessionRequest, context: Context) -> pb.CreateSessionResponse:
        """See SessionService."""
        return await self._forward(self._stub.CreateSession, request, context)

    async def ForkSession(self, request: pb.ForkSessionRequest, context: Context) -> pb.ForkSessionResponse:
        """See SessionService."""
        return await self._forward(self._stub.ForkSession, request, context)

    async def GetSession(self, request: pb.GetSessionRequest, context: Context) -> pb.GetSessionResponse:
        """See SessionService."""
        return await self._forward(self._stub.GetSession, request, context)

    async def ListSessions(self, request: pb.ListSessionsRequest, context: Context) -> pb.ListSessionsResponse:
        """See SessionService."""
        return await self._forward(self._stub.ListSessions, request, context)

    async def DeleteSession(self, request: pb.DeleteSessionRequest, context: Context) -> pb.DeleteSessionResponse:
        """See SessionService."""
        return await self._forward(self._stub.DeleteSession, request, context)
