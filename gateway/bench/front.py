"""Many streams over gRPC, counted at their clients, and the processor time of whoever serves them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import time
from typing import Any

from gateway.bench.bare_server import BareStack
from gateway.bench.null_executor import VOCAB_SIZE
from gateway.bench.null_stack import NullStack
from protos.gateway.v1 import gateway_pb2 as pb
from protos.gateway.v1 import gateway_pb2_grpc
from quire.errors import QuireError
from quire.rpc import open_channel

_PROMPT_BLOCKS = 4
_MAX_TOKENS = 100_000
_START_SECONDS = 60.0


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """What happened while it was counted."""

    seconds: float
    message_count: int
    """Messages with tokens that clients received."""
    token_count: int
    cpu_seconds: dict[str, float]
    """Processor time of each service, and of the clients, which are one process."""

    @property
    def messages_per_core_second(self) -> float:
        """Messages for each second of processor time that the gateway took, all its threads together."""
        return self.message_count / self.cpu_seconds["gateway"]

    @property
    def tokens_per_second(self) -> float:
        """Tokens that arrived, a second."""
        return self.token_count / self.seconds

    def step_seconds(self, running: int) -> float:
        """Returns the time of a step, in which each of `running` sequences has one token."""
        return self.seconds * running / self.token_count

    def step_cpu_seconds(self, service: str, running: int) -> float:
        """Returns the processor time that a service takes for a step of `running` sequences."""
        return self.cpu_seconds[service] * running / self.token_count


class Front:
    """Clients whose streams never end, and what serves them.

    Args:
        running: streams.
        services: what serves them; not started yet.
        block_size: tokens in a block.
        connections: connections that the clients share.
    """

    def __init__(
        self, running: int, services: NullStack | BareStack, block_size: int = 16, connections: int = 1
    ) -> None:
        self._running = running
        self._block_size = block_size
        self._connections = connections
        self._services = services
        self._stack = contextlib.AsyncExitStack()
        self._stack.push_async_callback(self._services.close)
        self._clients: list[asyncio.Task[None]] = []
        self._message_count = 0
        self._token_count = 0
        self._begun: set[int] = set()
        self._all_begun = asyncio.Event()

    async def start(self) -> None:
        """Starts everything and waits until every stream has its first token.

        Raises:
            QuireError: a service did not start, or a stream ended.
        """
        await self._services.start()
        stubs = []
        for _ in range(self._connections):
            channel = await self._stack.enter_async_context(open_channel(self._services.address))
            stubs.append(gateway_pb2_grpc.GenerationServiceStub(channel))
        self._clients = [
            asyncio.create_task(self._client(stubs[index % len(stubs)], index), name=f"client-{index}")
            for index in range(self._running)
        ]
        waiting = asyncio.create_task(self._all_begun.wait())
        done, _ = await asyncio.wait(
            [waiting, *self._clients], timeout=_START_SECONDS, return_when=asyncio.FIRST_COMPLETED
        )
        if waiting not in done:
            waiting.cancel()
            reasons = {str(task.exception()) for task in done}
            raise QuireError(f"{len(self._begun)} of {self._running} streams began: {reasons or 'no answer'}")

    async def _client(self, stub: Any, index: int) -> None:
        length = _PROMPT_BLOCKS * self._block_size + index % self._block_size
        spec = pb.GenerationSpec(
            request_id=f"bench-{index}",
            token_ids=pb.TokenIds(ids=[byte % VOCAB_SIZE for byte in os.urandom(length)]),
            sampling=pb.Sampling(temperature=0.0),
            stopping=pb.Stopping(max_tokens=_MAX_TOKENS, ignore_eos=True),
        )
        async for event in stub.GenerateStream(pb.GenerateStreamRequest(spec=spec)):
            samples = event.delta.samples
            if samples:
                self._message_count += 1
                self._token_count += len(samples[0].token_ids)
                if index not in self._begun:
                    self._begun.add(index)
                    if len(self._begun) == self._running:
                        self._all_begun.set()

    async def count(self, seconds: float) -> Window:
        """Counts for so long.

        Raises:
            QuireError: a stream ended.
            UnsupportedError: the processor time of processes cannot be read here.
        """
        messages, tokens = self._message_count, self._token_count
        cpu, own, begun = self._services.cpu_seconds(), time.process_time(), time.perf_counter()
        await asyncio.sleep(seconds)
        elapsed = time.perf_counter() - begun
        spent = {name: now - cpu[name] for name, now in self._services.cpu_seconds().items()}
        spent["clients"] = time.process_time() - own
        for client in self._clients:
            if client.done():
                raise QuireError(f"a stream ended while it was measured: {client.exception()}")
        return Window(elapsed, self._message_count - messages, self._token_count - tokens, spent)

    async def close(self) -> None:
        """Ends the streams and stops everything."""
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        await self._stack.aclose()
