"""Wiring and life cycle of the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
import dataclasses
import platform

import structlog

from gateway.clients.executor import ExecutorLink, RemoteExecutor
from gateway.clients.memory import RemoteMemory
from gateway.config import GatewayConfig
from gateway.engine import Engine
from gateway.service import GenerationService
from gateway.session_service import SessionService
from protos.gateway.v1 import gateway_pb2, gateway_pb2_grpc, session_pb2, session_pb2_grpc
from quire.config import describe
from quire.memory import Memory
from quire.service_host import ServiceHost

log = structlog.get_logger(__name__)

SERVICE_NAMES = (
    gateway_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
    session_pb2.DESCRIPTOR.services_by_name["SessionService"].full_name,
)


def complete(config: GatewayConfig) -> GatewayConfig:
    """Returns the configuration with derived values filled in."""
    if config.gateway_id:
        return config
    return dataclasses.replace(config, gateway_id=f"{platform.node()}:{config.port}")


async def serve(config: GatewayConfig, sources: Mapping[str, str]) -> int:
    """Runs the gateway of a cluster until it is told to stop; returns the exit code.

    Raises:
        ConfigError: the address cannot be bound.
    """
    config = complete(config)
    log.info("config_loaded", **describe(config, sources))
    return await run(config, RemoteMemory(config.memsvc, config.gateway_id), RemoteExecutor)


async def run(config: GatewayConfig, memory: Memory, connect: Callable[[str], ExecutorLink]) -> int:
    """Serves on the given memory and executors until told to stop; returns the exit code."""
    host = ServiceHost(config, SERVICE_NAMES)
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

    engine = Engine(memory, connect, config, on_readiness, on_fatal)
    gateway_pb2_grpc.add_GenerationServiceServicer_to_server(GenerationService(engine, config), host.server)
    session_pb2_grpc.add_SessionServiceServicer_to_server(SessionService(engine, config), host.server)
    await host.start()
    follower = asyncio.create_task(follow_readiness(), name="readiness")
    try:
        await engine.start()
        await host.wait_for_stop()
        follower.cancel()
        await host.stop(engine.drain)
    finally:
        follower.cancel()
        await asyncio.gather(follower, return_exceptions=True)
        await engine.close()
    return 1 if defects else 0
