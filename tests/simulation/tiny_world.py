"""A gateway on the memory core and the real executor with a tiny random model, in one process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from execsvc.config import ExecsvcConfig
from execsvc.local import LocalExecutor
from gateway.config import GatewayConfig
from gateway.engine import Engine
from gateway.in_process import InProcessLink
from memsvc.core.invariants import check_pool
from memsvc.core.memory import MemoryCore
from memsvc.core.pool import BlockState
from memsvc.local import LocalMemory
from protos.execsvc.v1 import execsvc_pb2
from quire.errors import ExecutorUnavailableError
from quire.memory import PoolSpec
from tests.simulation.oracle_executor import tokenizer_files
from tests.unit.execsvc import tiny

EOS_TOKEN = 256
SIZE = 16
CONTEXT = 256
MODEL = dataclasses.replace(tiny.CONFIG, num_layers=2)
MAX_NUM_SEQS = 16
_POOL_ID = "executor-0"


def write_model(directory: Path) -> str:
    """Writes the model, with a tokenizer of bytes and a token that ends a text; returns where."""
    tiny.write_directory(directory, MODEL)
    tokenizer = Tokenizer.from_str(tokenizer_files().tokenizer_json.decode())
    tokenizer.add_special_tokens(["<end>"])
    assert tokenizer.token_to_id("<end>") == EOS_TOKEN
    tokenizer.save(str(directory / "tokenizer.json"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"eos_token_id": EOS_TOKEN}))
    return str(directory)


class FailingLink(InProcessLink):
    """A link whose session ends at given steps, counted over all sessions: what was sent is lost."""

    def __init__(self, executor: LocalExecutor, fail_at: tuple[int, ...] = ()) -> None:
        super().__init__(executor)
        self._fail_at = fail_at
        self.step_count = 0

    async def run(self, plan: execsvc_pb2.StepPlan) -> execsvc_pb2.StepResult:
        """See ExecutorLink."""
        self.step_count += 1
        failing = self.step_count in self._fail_at
        result = await super().run(plan)
        if failing:
            raise ExecutorUnavailableError("the session is over")
        return result


class TinyWorld:
    """A gateway, a memory core and an executor; `start` before use.

    Args:
        model: where `write_model` has written it.
        blocks: of the pool.
        fail_at: steps whose result is lost, and the session with it.
        forecast: whether the core keeps headroom for what runs; without it there are more shortages.
        swap_space: host memory for blocks that are swapped out.
        settings: of the gateway.
    """

    def __init__(
        self,
        model: str,
        blocks: int,
        *,
        fail_at: tuple[int, ...] = (),
        forecast: bool = False,
        swap_space: str | None = None,
        **settings: Any,
    ) -> None:
        config = ExecsvcConfig(
            model=model,
            kv_cache_tokens=(blocks - 1) * SIZE,
            max_model_len=CONTEXT,
            max_num_seqs=MAX_NUM_SEQS,
            num_threads=1,
            swap_space=swap_space,
        )
        self.defects: list[object] = []
        self.executor = LocalExecutor(config, self.defects.append)
        self.link = FailingLink(self.executor, fail_at)
        self.memory = LocalMemory(MemoryCore(bytes(32), lease_ttl=float("inf"), forecast=forecast))
        self.config = GatewayConfig(
            gateway_id="test", max_queue_size=1024, max_queue_time=600.0, max_num_seqs=MAX_NUM_SEQS, **settings
        )
        self._ready = asyncio.Event()
        self.core: Any = Engine(self.memory, lambda _: self.link, self.config, self._readiness, self.defects.append)
        self.engine: Any = self.core
        """What takes requests: the engine itself, or a front's end of the stream to it."""

    def _readiness(self, ready: bool) -> None:
        if ready:
            self._ready.set()

    async def start(self) -> None:
        """Loads the model and waits until it is served."""
        await self.executor.start()
        description = await self.executor.describe()
        pool = description.pool
        spec = PoolSpec(pool.block_count, SIZE, pool.bytes_per_block, pool.model_id, pool.kv_dtype, pool.max_model_len)
        epoch = self.memory.register_pool(_POOL_ID, description.executor_incarnation, "in-process:0", spec)
        await self.executor.begin_epoch(epoch)
        await self.core.start()
        await self._ready.wait()

    @property
    def swap_count(self) -> int:
        """Preemptions whose content went to host memory."""
        return self.memory.core.pool(_POOL_ID).memory.statistics.swap_count

    async def settle(self) -> None:
        """Waits until nothing lives, then checks that nothing is held."""
        await self.engine.drain()
        await self.core.drain()
        memory = self.memory.core.pool(_POOL_ID).memory
        for _ in range(200):
            held = sum(memory.pool.count(state) for state in (BlockState.USED, BlockState.LEASED, BlockState.PENDING))
            schedulers = [lane.scheduler for lane in self.core._lanes.values() if lane.scheduler is not None]
            slots = sum(scheduler.swapping.held_count for scheduler in schedulers)
            if not held and not slots:
                break
            await asyncio.sleep(0.005)
        assert not held
        assert not slots, "a slot of host memory leaked"
        fenced = await self.executor.fence(execsvc_pb2.FenceRequest())
        assert not fenced.open_tables
        assert not self.defects
        check_pool(memory)


@contextlib.asynccontextmanager
async def serving(world: TinyWorld, seconds: float) -> AsyncIterator[TinyWorld]:
    """Starts a world and, after the test or at its time limit, stops it."""
    async with asyncio.timeout(seconds):
        try:
            await world.start()
            yield world
        finally:
            await world.core.close()
            await world.executor.close()
