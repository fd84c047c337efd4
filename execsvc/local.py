"""The executor in this process: the RPCs of ExecutorService as coroutines, without gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from execsvc.config import ExecsvcConfig
from execsvc.executor import Executor, PlanStream
from execsvc.loading import load as load_model
from protos.execsvc.v1 import execsvc_pb2 as pb
from quire.errors import NotReadyError


class LocalExecutor:
    """An executor for one gateway in the same process; the engine computes in a thread of its own.

    Life: `start` loads the model, `begin_epoch` takes what memsvc granted, `open`, `run` ..., `close`.
    """

    def __init__(self, config: ExecsvcConfig, on_defect: Callable[[BaseException], None] = lambda _: None) -> None:
        """Prepares; call from the event loop. `on_defect` hears of what makes the executor useless."""
        self._config = config
        self._executor = Executor(config, on_defect)
        self._stream: PlanStream | None = None

    async def start(self, progress: Callable[[float], None] = lambda _: None) -> None:
        """Loads the model in a thread.

        Raises:
            ModelFormatError, UnsupportedError, ConfigError: it cannot be loaded.
        """

        def report(share: float) -> None:
            self._executor.load_progress = share
            progress(share)

        self._executor.become_ready(await asyncio.to_thread(load_model, self._config, report))

    async def begin_epoch(self, epoch: int) -> None:
        """Accepts the epoch that memsvc granted; older tables and the open stream end."""
        await self._executor.begin_epoch(epoch)

    async def describe(self) -> pb.DescribeResponse:
        """Returns what runs here."""
        return self._executor.describe()

    async def tokenizer(self) -> tuple[str, str, str, str]:
        """Returns (chat template, bos token, eos token, tokenizer.json)."""
        return self._executor.tokenizer()

    async def open(self, request: pb.Open) -> pb.Opened:
        """Opens the stream of plans; one that was open is closed.

        Raises:
            NotReadyError: `start` or `begin_epoch` has not been called.
            StaleEpochError: another incarnation or epoch.
        """
        await self._close_stream()
        self._stream = self._executor.open_stream(request)
        return pb.Opened(epoch=self._stream.epoch)

    async def run(self, plan: pb.StepPlan) -> pb.StepResult:
        """Applies one plan. A caller may send the next before this one's result is there; order is that of the calls.

        Raises:
            StaleEpochError: the stream is over, or the plan is out of order.
            InvalidRequestError: the plan is malformed.
        """
        if self._stream is None:
            raise NotReadyError("open comes before run")
        return await (await self._executor.submit(self._stream, plan))

    async def fence(self, request: pb.FenceRequest) -> pb.FenceResponse:
        """Refuses gateways and epochs; returns when nothing in flight can write to their blocks."""
        return await self._executor.fence(request)

    async def close(self) -> None:
        """Drops every sequence and ends the engine's thread."""
        await self._close_stream()
        await self._executor.close()

    async def _close_stream(self) -> None:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            await self._executor.close_stream(stream)
