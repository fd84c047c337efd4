"""A gateway on the real memory core and the oracle executor, in one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
import contextlib
import dataclasses
import random

import pytest

from gateway.config import GatewayConfig
from gateway.engine import Engine
from gateway.streams import RequestStream
from gateway.validation import check_spec
from memsvc.core.invariants import check_pool
from memsvc.core.memory import MemoryCore
from memsvc.core.pool import BlockState
from memsvc.local import LocalMemory
from protos.gateway.v1 import gateway_pb2 as pb
from quire.memory import PoolSpec
from tests.simulation.oracle_executor import OracleExecutor

DEADLINE_SECONDS = 60.0


class World:
    """A gateway, a memory core and an executor in one event loop."""

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
            scheduling_policy=policy,
            long_prefill_token_threshold=long_prefill_token_threshold,
            preemption_mode=preemption_mode,
        )
        self.ready = asyncio.Event()
        self.defects: list[str] = []
        self.engine = Engine(self.memory, lambda _: self.executor, self.config, self._readiness, self.defects.append)

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
        schedulers = [lane.scheduler for lane in self.engine._lanes.values() if lane.scheduler is not None]
        counts = [scheduler.swapping.held_count for scheduler in schedulers]
        return max(*counts, len(self.executor.host) if isinstance(self.executor, OracleExecutor) else 0, 0)

    def held(self) -> int:
        """Returns the blocks that a table, a lease or a fence holds."""
        pool = self.memory.core.pool("oracle").memory.pool
        return sum(pool.count(state) for state in (BlockState.USED, BlockState.LEASED, BlockState.PENDING))


@contextlib.asynccontextmanager
async def running(world: World) -> AsyncIterator[World]:
    """Starts a world and, after the test, stops it."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        await world.engine.start()
        await world.ready.wait()
        try:
            yield world
        finally:
            await world.engine.close()


def ids(tokens: list[int]) -> pb.TokenIds:
    """Returns a prompt."""
    return pb.TokenIds(ids=tokens)
