"""Wiring and life cycle of the gateway: of the whole of it in one process, of its engine, or of one of its fronts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
import dataclasses
import platform
import secrets
from typing import TYPE_CHECKING, Protocol, TypeVar

import structlog

from gateway.clients.executor import ExecutorLink, RemoteExecutor
from gateway.clients.memory import RemoteMemory
from gateway.config import GatewayConfig
from gateway.engine import Engine
from gateway.fronts.engine_service import EngineService
from gateway.service import GenerationService
from gateway.session_service import SessionService
from protos.gateway.v1 import engine_pb2, engine_pb2_grpc, gateway_pb2, gateway_pb2_grpc, session_pb2, session_pb2_grpc
from quire.config import describe
from quire.memory import Memory
from quire.service_host import ServiceHost

if TYPE_CHECKING:
    import grpc

log = structlog.get_logger(__name__)

SERVICE_NAMES = (
    gateway_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
    session_pb2.DESCRIPTOR.services_by_name["SessionService"].full_name,
)
_ENGINE_SERVICE = engine_pb2.DESCRIPTOR.services_by_name["EngineService"].full_name


class Worker(Protocol):
    """What a process of the gateway has under its services."""

    async def start(self) -> None:
        """Begins to work; whether it can serve is told."""
        ...

    async def drain(self) -> None:
        """Refuses new requests and waits until the live ones have ended."""
        ...

    async def close(self) -> None:
        """Ends what still lives, and everything else."""
        ...


AnyWorker = TypeVar("AnyWorker", bound=Worker)


def complete(config: GatewayConfig, port: int | None = None) -> GatewayConfig:
    """Returns the configuration with derived values filled in, and with the port that was found, if one was.

    A port that is not known yet names nobody: two gateways of one machine would take each other for an earlier life of
    their own.
    """
    port = config.port if port is None else port
    name = f"{platform.node()}:{port or secrets.token_hex(4)}"
    return dataclasses.replace(config, port=port, gateway_id=config.gateway_id or name)


async def serve(config: GatewayConfig, sources: Mapping[str, str], engine_address: str = "") -> int:
    """Runs the gateway of a cluster until it is told to stop; returns the exit code.

    Raises:
        ConfigError: the address cannot be bound.
    """
    config = complete(config)
    log.info("config_loaded", **describe(config, sources))
    memory = RemoteMemory(config.memsvc, config.gateway_id)
    return await run(config, memory, RemoteExecutor, engine_address)


async def run(
    config: GatewayConfig, memory: Memory, connect: Callable[[str], ExecutorLink], engine_address: str = ""
) -> int:
    """Serves on the given memory and executors until told to stop; returns the exit code.

    Args:
        config: of the gateway.
        memory: where blocks come from.
        connect: makes a link to the executor at an address.
        engine_address: where to serve fronts, which then have the gateway's own address; empty: there are none.
    """
    fronts: list[EngineService] = []

    def make(on_readiness: Callable[[bool], None], on_fatal: Callable[[str], None]) -> Engine:
        def tell(ready: bool) -> None:  # noqa: FBT001 - a callback with one meaning
            on_readiness(ready)
            for service in fronts:
                service.tell_state()

        return Engine(memory, connect, config, tell, on_fatal)

    def add(engine: Engine, server: grpc.aio.Server) -> None:
        sessions = SessionService(engine, config)
        gateway_pb2_grpc.add_GenerationServiceServicer_to_server(GenerationService(engine, config), server)
        session_pb2_grpc.add_SessionServiceServicer_to_server(sessions, server)
        if engine_address:
            fronts.append(EngineService(engine, sessions.table))
            engine_pb2_grpc.add_EngineServiceServicer_to_server(fronts[0], server)

    if engine_address:
        host = ServiceHost(config, (*SERVICE_NAMES, _ENGINE_SERVICE), private_address=engine_address)
    else:
        host = ServiceHost(config, SERVICE_NAMES)
    return await host_worker(host, make, add)


async def host_worker(
    host: ServiceHost,
    make: Callable[[Callable[[bool], None], Callable[[str], None]], AnyWorker],
    add: Callable[[AnyWorker, grpc.aio.Server], None],
    *,
    work_first: bool = False,
) -> int:
    """Runs one process of a gateway until it is told to stop; returns the exit code.

    Args:
        host: its outside.
        make: makes what works in it, given who hears whether it can serve, and of a defect.
        add: adds its services to a server.
        work_first: whether what works in it starts before anybody can call.
    """
    readiness: asyncio.Queue[bool] = asyncio.Queue(1)
    defects: list[str] = []

    def on_fatal(reason: str) -> None:
        defects.append(reason)
        host.request_stop(reason)

    def on_readiness(ready: bool) -> None:  # noqa: FBT001 - a callback with one meaning
        if readiness.full():
            readiness.get_nowait()
        readiness.put_nowait(ready)

    async def follow_readiness() -> None:
        while True:
            ready = await readiness.get()
            await host.set_serving(serving=ready)
            log.info("service_ready" if ready else "service_not_ready", address=host.address)

    worker = make(on_readiness, on_fatal)
    add(worker, host.server)
    follower: asyncio.Task[None] | None = None
    try:
        if work_first:
            await worker.start()
        await host.start()
        # Not before: a host that starts is not serving, whatever was said.
        follower = asyncio.create_task(follow_readiness(), name="readiness")
        if not work_first:
            await worker.start()
        await host.wait_for_stop()
        follower.cancel()
        await host.stop(worker.drain)
    finally:
        if follower is not None:
            follower.cancel()
            await asyncio.gather(follower, return_exceptions=True)
        await worker.close()
    return 1 if defects else 0
