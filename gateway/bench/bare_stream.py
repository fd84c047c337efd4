"""What a message to memsvc and back costs when there is nothing to do: the floor of all that goes over the stream."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

from memsvc.bench.samples import Samples
from protos.memsvc.v1 import memsvc_pb2 as pb
from protos.memsvc.v1 import memsvc_pb2_grpc
from quire.rpc import open_channel

_ANSWER_SECONDS = 10.0


class BareStream:
    """A gateway's stream on which nothing is said but pings.

    Args:
        address: of memsvc, host:port.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._call: Any = None

    async def start(self, stack: contextlib.AsyncExitStack) -> None:
        """Opens the stream; `stack` closes it."""
        channel = await stack.enter_async_context(open_channel(self._address))
        self._call = memsvc_pb2_grpc.MemoryServiceStub(channel).Connect()
        stack.callback(self._call.cancel)
        hello = pb.Hello(gateway_id="bare", gateway_incarnation=1)
        await self._call.write(pb.ConnectRequest(hello=hello))

    async def sample(self, count: int) -> Samples:
        """Times `count` pings, each until its answer is here."""
        samples: Samples = {"ping_grpc": []}
        ping = pb.ConnectRequest(ping=pb.Ping())
        for _ in range(count):
            begun = time.perf_counter()
            await self._call.write(ping)
            await asyncio.wait_for(self._pong(), _ANSWER_SECONDS)
            samples["ping_grpc"].append(time.perf_counter() - begun)
        return samples

    async def _pong(self) -> None:
        while (await self._call.read()).WhichOneof("message") != "pong":
            pass
