"""A whole Quire without a model: memsvc, an executor that computes nothing, and a gateway, on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from typing import Any

from gateway.bench.memsvc_process import MemsvcProcess
from gateway.bench.service_process import ServiceProcess
from memsvc.bench import core
from protos.gateway.v1 import gateway_pb2 as pb
from protos.gateway.v1 import gateway_pb2_grpc
from quire.rpc import open_channel

_READY_SECONDS = 30.0
_POLL_SECONDS = 0.05


class NullStack:
    """Three processes on free ports.

    Args:
        running: most sequences at once.
        step_seconds: time that a step takes at the executor; 0 for none.
        block_size: tokens in a block.
        block_count: blocks that can be granted.
        gateway_flags: further flags of the gateway.
    """

    def __init__(
        self,
        running: int,
        step_seconds: float = 0.0,
        block_size: int = 16,
        block_count: int = core.BLOCKS,
        gateway_flags: tuple[str, ...] = (),
    ) -> None:
        self._running = running
        self._step_seconds = step_seconds
        self._spec = core.pool_spec(block_size, block_count)
        self._gateway_flags = gateway_flags
        self._stack = contextlib.AsyncExitStack()
        self._services: dict[str, ServiceProcess] = {}

    @property
    def address(self) -> str:
        """Where the gateway listens."""
        return self._services["gateway"].address

    @property
    def memsvc_address(self) -> str:
        """Where the memory service listens."""
        return self._services["memsvc"].address

    async def start(self) -> None:
        """Starts everything and waits until the model is served.

        Raises:
            QuireError: a service did not start.
            TimeoutError: the model is not served.
        """
        memsvc = MemsvcProcess()
        await self._run("memsvc", memsvc)
        flags: tuple[str, ...] = ("--step-seconds", str(self._step_seconds), "--max-num-seqs", str(self._running))
        module, own = "gateway.bench.null_executor", "QUIRE_NULL_EXECUTOR_"
        executor = ServiceProcess(module, flags, event="service_listening", own_settings=own)
        await self._run("execsvc", executor)
        await memsvc.register_pool(core.POOL_ID, self._spec, executor.address)
        flags = ("--memsvc", memsvc.address, "--max-num-seqs", str(self._running), *self._gateway_flags)
        gateway = ServiceProcess("gateway", flags, event="service_listening", own_settings="QUIRE_GATEWAY_")
        await self._run("gateway", gateway)
        async with open_channel(gateway.address) as channel, asyncio.timeout(_READY_SECONDS):
            stub: Any = gateway_pb2_grpc.GenerationServiceStub(channel)
            for _ in itertools.count():
                if (await stub.ListModels(pb.ListModelsRequest())).models:
                    return
                await asyncio.sleep(_POLL_SECONDS)

    async def _run(self, name: str, service: ServiceProcess) -> None:
        self._stack.push_async_callback(service.close)
        await service.start()
        self._services[name] = service

    def cpu_seconds(self) -> dict[str, float]:
        """Returns the processor time that each service has taken; raises UnsupportedError where nobody tells.

        That of a gateway of several processes is the sum, and beside it what each of them has taken.
        """
        taken = {name: service.cpu_seconds() for name, service in self._services.items()}
        workers = self._services["gateway"].worker_cpu_seconds()
        taken["gateway"] += sum(workers.values())
        return taken | workers

    async def close(self) -> None:
        """Stops everything."""
        await self._stack.aclose()
