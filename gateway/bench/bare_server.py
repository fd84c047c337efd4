"""`python -m gateway.bench.bare_server`: streams that cost what gRPC costs, and nothing else."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import TYPE_CHECKING, Any, TypeAlias

from gateway.bench.service_process import ServiceProcess, run_service
from protos.gateway.v1 import gateway_pb2 as pb
from protos.gateway.v1 import gateway_pb2_grpc
from quire.config import ServiceConfig, setting

if TYPE_CHECKING:
    import grpc

_SERVICE = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name
_TOKEN = 7

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


@dataclasses.dataclass(frozen=True, slots=True)
class BareServerConfig(ServiceConfig):
    """A server that sends every stream the same message, again and again."""

    step_seconds: float = setting(0.0, "Seconds between the messages of a stream.", minimum=0)


class BareServer(gateway_pb2_grpc.GenerationServiceServicer):
    """Writes a message with one token to all streams at once, every step; nothing is scheduled or computed."""

    def __init__(self, step_seconds: float) -> None:
        """Starts the clock."""
        self._step_seconds = step_seconds
        self._step = asyncio.Event()
        self._clock = asyncio.create_task(self._tick(), name="clock")

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._step_seconds)
            step, self._step = self._step, asyncio.Event()
            step.set()

    async def GenerateStream(self, request: pb.GenerateStreamRequest, context: Context) -> None:  # type: ignore[override]
        """Streams until the client leaves."""
        while True:
            await self._step.wait()
            message = pb.GenerateStreamResponse()
            sample = message.delta.samples.add()
            sample.text = "a"
            sample.token_ids.append(_TOKEN)
            await context.write(message)


class BareStack:
    """The server as a process, in the place of a whole Quire; see `gateway.bench.null_stack.NullStack`."""

    def __init__(self, step_seconds: float) -> None:
        flags = ("--step-seconds", str(step_seconds))
        module, own = "gateway.bench.bare_server", "QUIRE_BARE_SERVER_"
        self._process = ServiceProcess(module, flags, event="service_listening", own_settings=own)

    @property
    def address(self) -> str:
        """Where it listens."""
        return self._process.address

    async def start(self) -> None:
        """Starts it; raises NotReadyError if it does not come up."""
        await self._process.start()

    def cpu_seconds(self) -> dict[str, float]:
        """Returns the processor time that it has taken, under the name of what it stands for."""
        return {"gateway": self._process.cpu_seconds()}

    async def close(self) -> None:
        """Stops it."""
        await self._process.close()


def _add(config: BareServerConfig, server: grpc.aio.Server) -> None:
    # Nobody calls the other methods.
    servicer = BareServer(config.step_seconds)  # type: ignore[abstract]
    gateway_pb2_grpc.add_GenerationServiceServicer_to_server(servicer, server)


if __name__ == "__main__":
    run_service(BareServerConfig, "bare_server", _SERVICE, _add)
