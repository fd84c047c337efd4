"""quire.execsvc.v1.ExecutorService: translates between gRPC and the executor."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from execsvc.executor import Executor, PlanStream, tokenizer_digest
from protos.execsvc.v1 import execsvc_pb2 as pb
from protos.execsvc.v1 import execsvc_pb2_grpc
from quire.errors import InvalidRequestError

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["ExecutorService"].full_name
_CHUNK_BYTES = 2**20
_PLANS_IN_FLIGHT = 4

Context = grpc.aio.ServicerContext[Any, Any]


class ExecutorServicer(execsvc_pb2_grpc.ExecutorServiceServicer):
    """The RPCs of an executor."""

    def __init__(self, executor: Executor) -> None:
        """Serves `executor`."""
        self._executor = executor

    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeResponse:
        """Says what runs here."""
        return self._executor.describe()

    async def GetTokenizer(
        self, request: pb.GetTokenizerRequest, context: Context
    ) -> AsyncIterator[pb.GetTokenizerResponse]:
        """Streams the tokenizer."""
        chat_template, bos_token, eos_token, text = self._executor.tokenizer()
        yield pb.GetTokenizerResponse(
            chat_template=chat_template, sha256=tokenizer_digest(text), bos_token=bos_token, eos_token=eos_token
        )
        data = text.encode()
        for start in range(0, len(data), _CHUNK_BYTES):
            yield pb.GetTokenizerResponse(chunk=data[start : start + _CHUNK_BYTES])

    async def Run(
        self, request_iterator: AsyncIterator[pb.RunRequest], context: Context
    ) -> AsyncIterator[pb.RunResponse]:
        """Runs steps: plans are handed over as they come, results go out in order."""
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("message") != "open":
            raise InvalidRequestError("message: the first message must be open", field="message")
        await self._executor.end_session(first.open.gateway_incarnation)
        stream = self._executor.open_stream(first.open)
        pending: asyncio.Queue[asyncio.Future[pb.StepResult] | None] = asyncio.Queue(_PLANS_IN_FLIGHT + 1)
        reader = asyncio.create_task(self._read(request_iterator, stream, pending), name="plan-reader")

        def stop_reading() -> None:
            reader.cancel()

        stream.on_end = stop_reading
        try:
            yield pb.RunResponse(opened=pb.Opened(epoch=stream.epoch))
            while (future := await pending.get()) is not None:
                yield pb.RunResponse(result=await future)
            if stream.ended is not None:
                raise stream.ended
            await reader
        finally:
            # A call that ends by itself may be cancelled on its way: the stream is closed all the same.
            reader.cancel()
            try:
                await asyncio.gather(reader, return_exceptions=True)
            finally:
                await self._executor.close_stream(stream)

    async def _read(
        self,
        requests: AsyncIterator[pb.RunRequest],
        stream: PlanStream,
        pending: asyncio.Queue[asyncio.Future[pb.StepResult] | None],
    ) -> None:
        """Hands plans over; at the end, whatever it is, tells the writer with None."""
        try:
            async for request in requests:
                if request.WhichOneof("message") != "plan":
                    raise InvalidRequestError("message: plans follow open, nothing else", field="message")
                await pending.put(await self._executor.submit(stream, request.plan))
        finally:
            # The writer must hear of the end even if the queue is full of results that nobody reads any more.
            while pending.full():
                pending.get_nowait()
            pending.put_nowait(None)

    async def Fence(self, request: pb.FenceRequest, context: Context) -> pb.FenceResponse:
        """Refuses gateways and epochs; answers when nothing in flight can write to their blocks."""
        return await self._executor.fence(request)
