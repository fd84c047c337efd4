"""The executor, as a gateway uses it: one protocol, implemented in this process and over gRPC."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

import grpc
import structlog

from gateway.tokenize import TokenizerFiles
from protos.execsvc.v1 import execsvc_pb2 as pb
from protos.execsvc.v1 import execsvc_pb2_grpc
from quire import status
from quire.errors import CorruptionError, ExecutorUnavailableError, QuireError
from quire.rpc import open_channel

log = structlog.get_logger(__name__)

_UNARY_SECONDS = 10.0
_TOKENIZER_SECONDS = 60.0


class ExecutorLink(Protocol):
    """One executor. `run` is called in the order of the steps, and again before the last call has returned."""

    async def describe(self) -> pb.DescribeResponse:
        """Returns what runs there; raises QuireError."""
        ...

    async def tokenizer(self) -> TokenizerFiles:
        """Returns the model's tokenizer; raises QuireError."""
        ...

    async def open(self, request: pb.Open) -> pb.Opened:
        """Starts a session of steps. Once it answers, no step of an earlier session of this gateway can write.

        Raises:
            StaleEpochError: another incarnation or epoch.
        """
        ...

    async def run(self, plan: pb.StepPlan) -> pb.StepResult:
        """Runs one step; raises QuireError, after which the session is over."""
        ...

    async def close(self) -> None:
        """Ends the session."""
        ...


class RemoteExecutor:
    """An executor behind gRPC."""

    def __init__(self, address: str) -> None:
        """Prepares a channel to host:port."""
        self._address = address
        self._channel = open_channel(address)
        self._stub = execsvc_pb2_grpc.ExecutorServiceStub(self._channel)
        self._call: grpc.aio.StreamStreamCall[pb.RunRequest, pb.RunResponse] | None = None
        self._reader: asyncio.Task[None] | None = None
        # Bounded by the pipeline depth: one entry for each step in flight.
        self._waiting: deque[asyncio.Future[pb.RunResponse]] = deque()
        self._write_lock = asyncio.Lock()

    async def describe(self) -> pb.DescribeResponse:
        """See ExecutorLink."""
        try:
            return await self._stub.Describe(pb.DescribeRequest(), timeout=_UNARY_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise status.from_rpc_error(error) from error

    async def tokenizer(self) -> TokenizerFiles:
        """See ExecutorLink."""
        first: pb.GetTokenizerResponse | None = None
        chunks = []
        try:
            async for message in self._stub.GetTokenizer(pb.GetTokenizerRequest(), timeout=_TOKENIZER_SECONDS):
                first = first or message
                chunks.append(message.chunk)
        except grpc.aio.AioRpcError as error:
            raise status.from_rpc_error(error) from error
        if first is None:
            raise CorruptionError(f"the executor at {self._address} sent no tokenizer")
        return TokenizerFiles(b"".join(chunks), first.sha256, first.chat_template, first.bos_token, first.eos_token)

    async def open(self, request: pb.Open) -> pb.Opened:
        """See ExecutorLink."""
        self._call = self._stub.Run()
        self._reader = asyncio.create_task(self._read(self._call), name=f"executor-results-{self._address}")
        response = await asyncio.wait_for(self._exchange(pb.RunRequest(open=request)), _UNARY_SECONDS)
        return response.opened

    async def run(self, plan: pb.StepPlan) -> pb.StepResult:
        """See ExecutorLink."""
        response = await self._exchange(pb.RunRequest(plan=plan))
        return response.result

    async def _exchange(self, request: pb.RunRequest) -> pb.RunResponse:
        """Sends one message and waits for its answer; answers come in order."""
        answer: asyncio.Future[pb.RunResponse] = asyncio.get_running_loop().create_future()
        async with self._write_lock:
            # Asked for here: the session may have ended while another message was written.
            call = self._call
            if call is None:
                raise ExecutorUnavailableError(f"the session with the executor at {self._address} is over")
            self._waiting.append(answer)
            try:
                await call.write(request)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                # The reader sees why the stream ended and fails every waiting answer, this one included.
                log.debug("executor_write_failed", address=self._address)
        return await answer

    async def _read(self, call: grpc.aio.StreamStreamCall[pb.RunRequest, pb.RunResponse]) -> None:
        """Hands each answer to the oldest waiter, until the stream ends."""
        failure: QuireError = ExecutorUnavailableError(f"the executor at {self._address} ended the session")
        try:
            async for response in call:
                answer = self._waiting.popleft()
                if not answer.done():
                    answer.set_result(response)
        except grpc.aio.AioRpcError as error:
            failure = status.from_rpc_error(error)
        finally:
            self._call = None
            while self._waiting:
                answer = self._waiting.popleft()
                if not answer.done():
                    answer.set_exception(failure)
                    answer.exception()  # A waiter that was cancelled never looks; that is no error.

    async def close(self) -> None:
        """See ExecutorLink."""
        if self._call is not None:
            self._call.cancel()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        await self._channel.close()
