"""The outside of a service: socket, health, reflection, signals, drain. Each `server.py` fills one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
import os
import signal
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
import structlog

from quire.errors import ConfigError
from quire.rpc import PRIVATE_OPTIONS, SERVER_OPTIONS, SHARED_PORT_OPTIONS, ErrorInterceptor

if TYPE_CHECKING:
    from quire.config import ServiceConfig

log = structlog.get_logger(__name__)

_PARENT_POLL_SECONDS = 0.5
_LOOPBACK = ("127.", "localhost", "[::1]", "::1")


class ServiceHost:
    """A gRPC server with health and reflection that drains on SIGTERM, SIGINT, or when its parent is gone.

    Life: add servicers to `server`, `start()`, `set_serving(True)` once the service can work, `wait_for_stop()`, then
    `stop()`. Health is NOT_SERVING before the second and after the fourth.
    """

    def __init__(
        self,
        config: ServiceConfig,
        service_names: tuple[str, ...],
        *,
        private_address: str = "",
        shared_port: bool = False,
    ) -> None:
        """Prepares a server.

        Args:
            config: where to listen, and how to end.
            service_names: fully qualified names of its gRPC services.
            private_address: unix:PATH to listen at instead: for other processes of the same service.
            shared_port: whether other processes of the same user may listen on the port, too.
        """
        self._config = config
        self._private_address = private_address
        self._service_names = service_names
        self._stop_requested = asyncio.Event()
        self._stop_reason = ""
        self._health = health.aio.HealthServicer()
        self._parent_watch: asyncio.Task[None] | None = None
        options = PRIVATE_OPTIONS if private_address else SHARED_PORT_OPTIONS if shared_port else SERVER_OPTIONS
        self.server = grpc.aio.server(options=options, interceptors=[ErrorInterceptor()])
        self.address = ""

    async def start(self) -> str:
        """Listens and returns "host:port", or the private address; not yet serving.

        Raises:
            ConfigError: the address cannot be bound.
        """
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        names = (*self._service_names, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.server)
        await self.set_serving(serving=False)
        wanted = self._private_address or f"{self._config.host}:{self._config.port}"
        try:
            port = self.server.add_insecure_port(wanted)
        except RuntimeError as error:
            message = (
                f"cannot listen on {wanted}: the port is in use or the address is not this machine's; choose --port"
            )
            raise ConfigError(message, field="port") from error
        if not (self._private_address or self._config.host.startswith(_LOOPBACK)):
            log.warning("address_not_loopback", address=wanted, advice="anyone who reaches this address can use it")
        self.address = self._private_address or f"{self._config.host}:{port}"
        await self.server.start()
        self._install_signal_handlers()
        if self._config.parent_pid:
            self._parent_watch = asyncio.create_task(self._watch_parent(), name="parent-watch")
        event = "private_service_listening" if self._private_address else "service_listening"
        log.info(event, address=self.address, pid=os.getpid())
        return self.address

    def _install_signal_handlers(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.request_stop, signal.Signals(number).name)

    async def _watch_parent(self) -> None:
        """Requests a stop when the parent process is gone (then another process has adopted this one)."""
        while os.getppid() == self._config.parent_pid:  # noqa: ASYNC110 - the system tells nobody, it must be asked
            await asyncio.sleep(_PARENT_POLL_SECONDS)
        self.request_stop("parent process is gone")

    async def set_serving(self, *, serving: bool) -> None:
        """Tells health checks whether the service can work."""
        state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *self._service_names):
            await self._health.set(name, state)

    def request_stop(self, reason: str) -> None:
        """Ends `wait_for_stop`. Later reasons are ignored."""
        if not self._stop_requested.is_set():
            self._stop_reason = reason
            self._stop_requested.set()

    async def wait_for_stop(self) -> str:
        """Waits until a stop is requested and returns why."""
        await self._stop_requested.wait()
        return self._stop_reason

    async def stop(self, drain: Callable[[], Awaitable[None]] | None = None) -> None:
        """Says NOT_SERVING, runs `drain` for at most the drain grace, and closes the socket."""
        log.info("service_draining", reason=self._stop_reason, grace_seconds=self._config.drain_grace)
        await self._health.enter_graceful_shutdown()
        if drain is not None:
            try:
                await asyncio.wait_for(drain(), self._config.drain_grace)
            except TimeoutError:
                log.warning("drain_incomplete", grace_seconds=self._config.drain_grace)
        if self._parent_watch is not None:
            self._parent_watch.cancel()
            await asyncio.gather(self._parent_watch, return_exceptions=True)
        await self.server.stop(grace=0.2)
        log.info("service_stopped", reason=self._stop_reason)
