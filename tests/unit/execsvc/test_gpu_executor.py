"""An executor whose steps finish later than they are launched, as gateways and memsvc see it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from execsvc.config import ExecsvcConfig
from execsvc.executor import Executor
from execsvc.gpu.runtime import EagerRuntime
from protos.execsvc.v1 import execsvc_pb2 as pb
from quire import columns
from quire.errors import ExecutorUnavailableError, StaleEpochError
from tests.unit.execsvc import tiny
from tests.unit.execsvc.tiny import start


class WatchedRuntime(EagerRuntime):
    """Notes when somebody waits until the device is idle; fails from then on if told."""

    def __init__(self) -> None:
        super().__init__()
        self.open_tables: list[list[int]] = []
        self.engine: Any = None
        self.error: Exception | None = None

    def synchronize(self) -> None:
        """Notes which tables are open at that time."""
        if self.error is not None:
            raise self.error
        self.open_tables.append(self.engine.open_tables)


async def _opened(runtime: WatchedRuntime, defects: list[BaseException]) -> tuple[Executor, Any]:
    """Returns an executor in epoch 2 and an open stream of gateway 5."""
    executor = Executor(ExecsvcConfig(), defects.append)
    runtime.engine = tiny.gpu_engine_of(runtime=runtime)
    loaded: Any = SimpleNamespace(engine=runtime.engine)
    executor.become_ready(loaded)
    await executor.begin_epoch(2)
    opening = pb.Open(gateway_id="gw", gateway_incarnation=5, executor_incarnation=executor.incarnation, epoch=2)
    return executor, executor.open_stream(opening)


def _plan(step: int, count: int, **fields: Any) -> pb.StepPlan:
    return pb.StepPlan(
        step=step, epoch=2, scheduled_tables=columns.pack([1]), scheduled_counts=columns.pack([count]), **fields
    )


async def test_plans_are_answered_in_order_and_a_fence_after_the_device() -> None:
    """A fence that is answered while a step runs would free blocks that are still being written."""
    runtime = WatchedRuntime()
    executor, stream = await _opened(runtime, [])
    try:
        plans = [_plan(1, 20, added=[start(1, range(20), [1, 2])]), _plan(2, 1), _plan(3, 1)]
        futures = [await executor.submit(stream, plan) for plan in plans]
        results = await asyncio.gather(*futures)
        assert [result.step for result in results] == [1, 2, 3]
        assert all(result.sampled_tokens for result in results)
        runtime.open_tables.clear()
        response = await executor.fence(pb.FenceRequest(gateway_incarnations=[5]))
        assert not response.open_tables
        # First what the gateway had was dropped, so that nothing new could begin; then the device was waited for.
        assert runtime.open_tables == [[]]
        with pytest.raises(StaleEpochError):
            await executor.submit(stream, _plan(4, 1))
    finally:
        await executor.close()


async def test_a_fence_on_a_device_that_failed_is_not_acknowledged() -> None:
    """What a broken device still writes nobody knows: only the end of the process is a fence."""
    runtime, defects = WatchedRuntime(), list[BaseException]()
    executor, _ = await _opened(runtime, defects)
    try:
        runtime.error = RuntimeError("CUDA error: unspecified launch failure")
        for _ in range(2):
            with pytest.raises(ExecutorUnavailableError, match="unspecified launch failure"):
                await executor.fence(pb.FenceRequest(gateway_incarnations=[5]))
        assert defects == [runtime.error]
    finally:
        await executor.close()
