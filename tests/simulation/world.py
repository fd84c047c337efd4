"""A gateway on the real memory core and the oracle executor, in one event loop; a front before its engine on wish."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
import contextlib
import dataclasses
from pathlib import Path
import random
import tempfile
from typing import Any, ClassVar

import pytest

from gateway.config import GatewayConfig
from gateway.engine import Engine
from gateway.fronts.engine_service import EngineService
from gateway.fronts.remote_engine import RemoteEngine
from gateway.fronts.session_service import FrontSessionService
from gateway.service import GenerationService
from gateway.session_service import SessionService
from gateway.streams import RequestStream
from gateway.validation import check_spec
from memsvc.core.invariants import check_pool
from memsvc.core.memory import MemoryCore
from memsvc.core.pool import BlockState
from memsvc.local import LocalMemory
from protos.gateway.v1 import engine_pb2, engine_pb2_grpc, gateway_pb2_grpc, session_pb2_grpc
from protos.gateway.v1 import gateway_pb2 as pb
from quire.memory import PoolSpec
from quire.rpc import open_private_channel
from quire.service_host import ServiceHost
from tests.simulation.oracle_executor import OracleExecutor

DEADLINE_SECONDS = 60.0


class World:
    """A gateway, a memory core and an executor in one event loop.

    `engine` is what takes requests: the engine itself, or a front's end of the stream to it.
    """

    with_front: ClassVar[bool] = False
    """Whether requests go through a front."""

    def __init__(
        self,
        block_count: int,
        *,
        budget: int = 64,
        queue_size: int = 64,
        seed: int = 0,
        policy: str = "fcfs",
        long_prefill_token_threshold: int = 0,
        window: int = 0,
        forecast: bool = False,
        context: int = 512,
        swap_slots: int = 0,
        preemption_mode: str = "auto",
        tenant_metadata: str = "",
        max_num_seqs: int = 256,
    ) -> None:
        """Lays out the pool; `start` connects. Without a forecast there are more shortages."""
        self.random = random.Random(seed)
        spec = PoolSpec(block_count, 16, 1024, "oracle-model", "float32", context, window)
        self.executor = OracleExecutor(spec, lambda: self.random.choice((0, 0, 0.001)), budget, swap_slots)
        self.memory = LocalMemory(MemoryCore(bytes(32), lease_ttl=float("inf"), forecast=forecast))
        self.memory.register_pool("oracle", self.executor.incarnation, "oracle:0", spec)
        self.config = GatewayConfig(
            gateway_id="test",
            max_queue_size=queue_size,
            max_num_seqs=max_num_seqs,
            scheduling_policy=policy,
            tenant_metadata=tenant_metadata,
            long_prefill_token_threshold=long_prefill_token_threshold,
            preemption_mode=preemption_mode,
        )
        self.ready = asyncio.Event()
        self.defects: list[str] = []
        # Any: tests look at what is not for everybody.
        self.core: Any = Engine(self.memory, lambda _: self.executor, self.config, self._readiness, self.defects.append)
        self.engine: Any = self.core
        self.sessions: Any = SessionService(self.core, self.config)
        self.address = ""
        """Where fronts attach, if there are any."""
        self.stop_engine_host: Any = None
        """Ends what fronts have attached to."""

    def _readiness(self, ready: bool) -> None:
        if ready:
            self.ready.set()

    async def submit(self, *, tenant: str = "", **fields: object) -> RequestStream:
        """Checks and submits a GenerationSpec with these fields, for a tenant."""
        spec = pb.GenerationSpec(**fields)
        model = self.engine.find_model("")
        settings = await check_spec(
            spec,
            model,
            max_tokens_default=64,
            max_queue_time=50.0,
            caching=True,
            priorities=self.config.scheduling_policy == "priority",
        )
        return self.engine.submit(dataclasses.replace(settings, tenant=tenant))

    async def collect(self, stream: RequestStream) -> tuple[list[list[int]], pb.Usage]:
        """Reads a stream to its end: the tokens of each sample, and the usage."""
        tokens: list[list[int]] = [[] for _ in range(stream.settings.sample_count)]
        async for event in stream.events():
            for sample in event.delta.samples:
                tokens[sample.index].extend(sample.token_ids)
            if event.HasField("finished"):
                return tokens, event.finished.usage
        pytest.fail("the stream ended without `finished`")

    async def settle(self) -> None:
        """Waits until nothing lives, then checks that nothing is held."""
        await self.engine.drain()
        await self.core.drain()
        for _ in range(200):
            if self.held() == self.swapped() == 0:
                break
            await asyncio.sleep(0.005)
        assert self.held() == 0
        assert self.swapped() == 0, "a slot of host memory leaked"
        assert not self.executor.rows
        assert not self.defects
        check_pool(self.memory.core.pool("oracle").memory)

    def swapped(self) -> int:
        """Returns the slots of host memory that hold something, for the gateway or for the executor."""
        schedulers = [lane.scheduler for lane in self.core._lanes.values() if lane.scheduler is not None]
        counts = [scheduler.swapping.held_count for scheduler in schedulers]
        return max(*counts, len(self.executor.host) if isinstance(self.executor, OracleExecutor) else 0, 0)

    def held(self) -> int:
        """Returns the blocks that a table, a lease or a fence holds."""
        pool = self.memory.core.pool("oracle").memory.pool
        return sum(pool.count(state) for state in (BlockState.USED, BlockState.LEASED, BlockState.PENDING))


@contextlib.asynccontextmanager
async def running(world: World) -> AsyncIterator[World]:
    """Starts a world and, after the test, stops it."""
    async with asyncio.timeout(DEADLINE_SECONDS), contextlib.AsyncExitStack() as stack:
        await world.core.start()
        stack.push_async_callback(world.core.close)
        await world.ready.wait()
        if world.with_front:
            directory = stack.enter_context(tempfile.TemporaryDirectory())
            world.address = f"unix:{Path(directory) / 'engine.sock'}"
            host = contextlib.AsyncExitStack()
            world.stop_engine_host = stack.push_async_callback(host.aclose)
            await host.enter_async_context(engine_host(world, world.address))
            front = await stack.enter_async_context(front_of(world, world.address))
            world.engine, world.sessions = front
        yield world


@contextlib.asynccontextmanager
async def engine_host(world: Any, address: str) -> AsyncIterator[None]:
    """Serves the engine of a world to fronts."""
    service = engine_pb2.DESCRIPTOR.services_by_name["EngineService"].full_name
    host = ServiceHost(world.config, (service,), private_address=address)
    sessions = SessionService(world.core, world.config)
    engine_pb2_grpc.add_EngineServiceServicer_to_server(EngineService(world.core, sessions.table), host.server)
    session_pb2_grpc.add_SessionServiceServicer_to_server(sessions, host.server)
    generation = GenerationService(world.core, world.config)
    gateway_pb2_grpc.add_GenerationServiceServicer_to_server(generation, host.server)
    await host.start()
    try:
        yield
    finally:
        await host.server.stop(0)


@contextlib.asynccontextmanager
async def front_of(world: Any, address: str) -> AsyncIterator[tuple[RemoteEngine, FrontSessionService]]:
    """Yields a front of an engine, once it is attached, and its sessions."""
    attached = asyncio.Event()
    channel = open_private_channel(address)
    engine = RemoteEngine(
        channel, world.config.tenant_metadata, 1_000, lambda ready: ready and attached.set(), world.defects.append
    )
    await engine.start()
    try:
        await attached.wait()
        yield engine, FrontSessionService(engine, world.config, channel)
    finally:
        await engine.close()


def ids(tokens: list[int]) -> pb.TokenIds:
    """Returns a prompt."""
    return pb.TokenIds(ids=tokens)
