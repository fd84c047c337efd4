"""`python -m gateway.fronts.worker`: one process of a gateway with several fronts; the gateway starts it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
import contextlib
import os
from pathlib import Path
import sys
from typing import TYPE_CHECKING, Final

import structlog

from gateway.fronts.config import WorkerConfig
from gateway.fronts.remote_engine import RemoteEngine
from gateway.fronts.session_service import FrontSessionService
from gateway.server import SERVICE_NAMES, host_worker, serve
from gateway.service import GenerationService
from protos.gateway.v1 import gateway_pb2_grpc, session_pb2_grpc
from quire.config import describe, load
from quire.errors import QuireError
from quire.logging import configure_logging
from quire.rpc import open_private_channel
from quire.service_host import ServiceHost

if TYPE_CHECKING:
    import grpc

log = structlog.get_logger(__name__)

ENGINE: Final = "engine"
"""Worker that is the engine; every other one is a front."""


async def serve_front(config: WorkerConfig, sources: Mapping[str, str]) -> int:
    """Runs a front until it is told to stop; returns the exit code.

    Raises:
        ConfigError: the address cannot be bound.
    """
    log.info("config_loaded", **describe(config, sources))
    channel = open_private_channel(config.engine_address)

    def make(on_readiness: Callable[[bool], None], on_fatal: Callable[[str], None]) -> RemoteEngine:
        # A flood that the engine does not keep up with waits in its queue, not here.
        return RemoteEngine(channel, config.tenant_metadata, 2 * config.max_queue_size, on_readiness, on_fatal)

    def add(engine: RemoteEngine, server: grpc.aio.Server) -> None:
        gateway_pb2_grpc.add_GenerationServiceServicer_to_server(GenerationService(engine, config), server)
        session_pb2_grpc.add_SessionServiceServicer_to_server(FrontSessionService(engine, config, channel), server)

    # The system gives connections to whoever listens: a front that has no engine yet must not.
    return await host_worker(ServiceHost(config, SERVICE_NAMES, shared_port=True), make, add, work_first=True)


def _run_engine(config: WorkerConfig, sources: Mapping[str, str]) -> int:
    """Runs the engine until it is told to stop; returns the exit code, and raises as `serve`."""
    try:
        if config.in_process:
            from gateway.in_process import serve_in_process  # noqa: PLC0415 - torch comes with it

            return asyncio.run(serve_in_process(config, sources, config.engine_address))
        return asyncio.run(serve(config, sources, config.engine_address))
    finally:
        if os.getppid() != config.parent_pid:
            # Whoever made the socket's directory was killed. It is empty by now, or not ours to remove.
            with contextlib.suppress(OSError):
                Path(config.engine_address.removeprefix("unix:")).parent.rmdir()


def main() -> int:
    """Runs a worker and returns the exit code."""
    try:
        config, sources = load(WorkerConfig, "gateway", sys.argv[1:], os.environ)
        configure_logging(config.log_level, config.log_format, service=f"gateway-{config.worker}")
        return _run_engine(config, sources) if config.worker == ENGINE else asyncio.run(serve_front(config, sources))
    except QuireError as error:
        sys.stderr.write(f"quire gateway: {error.message}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
