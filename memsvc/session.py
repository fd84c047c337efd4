"""One open Connect stream: a gateway's requests in, answers and news out."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import TypeVar

from memsvc import translate
from memsvc.core.lease import AnswerLog
from memsvc.keeper import Keeper
from protos.memsvc.v1 import memsvc_pb2
from quire import columns
from quire.errors import DeadlineError, InvalidRequestError, QuireError, StaleEpochError
from quire.memory import BlocksMerged, BlocksRecalled, MemoryEvent, PoolUpdated

Request = TypeVar("Request", memsvc_pb2.AdmitRequest, memsvc_pb2.ForkRequest, memsvc_pb2.LeaseRequest)

# Responses that wait for a gateway to read them: above the first no more requests are read, above the second the
# gateway counts as stuck.
_READ_LIMIT = 1024
_PUSH_LIMIT = 8192
# When the requests end, a broken stream is cancelled within moments; one that is not was closed on purpose.
_GOODBYE_SECONDS = 0.05


class Session:
    """Serves one gateway.

    Args:
        keeper: the owner of the core.
    """

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._number = 0
        self._answers: AnswerLog[memsvc_pb2.ConnectResponse] = AnswerLog()
        self._waiting: deque[memsvc_pb2.ConnectResponse] = deque()
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._error: QuireError | None = None
        self._finished = False

    async def run(
        self, requests: AsyncIterator[memsvc_pb2.ConnectRequest]
    ) -> AsyncGenerator[memsvc_pb2.ConnectResponse, None]:
        """Yields the responses to `requests` and the news in between.

        Raises:
            InvalidRequestError: a message that cannot be understood.
            StaleEpochError: a journal that does not fit, or the gateway's lease is over.
        """
        hello = await self._hello(requests)
        self._number = self._keeper.connect_gateway(hello.gateway_id, hello.gateway_incarnation, self)
        clean = False
        reader = asyncio.create_task(self._read(requests), name=f"gateway-{self._number}")
        try:
            yield self._welcome()
            for pool in list(self._keeper.core.pools.values()):
                self.push(PoolUpdated(pool.info()))
            while True:
                while self._waiting:
                    yield self._waiting.popleft()
                self._room.set()
                if self._error is not None:
                    raise self._error
                if self._finished:
                    break
                self._wake.clear()
                await self._wake.wait()
            await asyncio.sleep(_GOODBYE_SECONDS)
            clean = True
        finally:
            # A call that ends by itself may be cancelled on its way: the gateway is gone all the same.
            reader.cancel()
            try:
                await asyncio.gather(reader, return_exceptions=True)
            finally:
                self._keeper.disconnect_gateway(self._number, clean=clean)

    def push(self, event: MemoryEvent) -> None:
        """Queues news."""
        if isinstance(event, PoolUpdated):
            self._put(memsvc_pb2.ConnectResponse(pool_update=translate.from_pool(event.pool)))
        elif isinstance(event, BlocksRecalled):
            recall = memsvc_pb2.Recall(pool_id=event.pool_id, epoch=event.epoch, block_count=event.block_count)
            self._put(memsvc_pb2.ConnectResponse(recall=recall))
        elif isinstance(event, BlocksMerged):
            self._put(translate.from_merge(event))

    def end(self, error: QuireError) -> None:
        """Ends the stream with `error`, after what is queued."""
        self._error = self._error or error
        self._wake.set()

    def _put(self, response: memsvc_pb2.ConnectResponse) -> None:
        if len(self._waiting) >= _PUSH_LIMIT:
            self.end(DeadlineError(f"{_PUSH_LIMIT} responses wait unread", reason="GATEWAY_STUCK"))
            return
        self._waiting.append(response)
        self._wake.set()

    async def _hello(self, requests: AsyncIterator[memsvc_pb2.ConnectRequest]) -> memsvc_pb2.Hello:
        """Returns the first message."""
        try:
            first = await asyncio.wait_for(anext(requests), self._keeper.config.lease_ttl)
        except StopAsyncIteration:
            raise InvalidRequestError("message: the stream ended before hello", field="hello") from None
        if first.WhichOneof("message") != "hello":
            found = first.WhichOneof("message") or "nothing"
            raise InvalidRequestError(f"message: the first must be hello, found {found}", field="hello")
        return first.hello

    def _welcome(self) -> memsvc_pb2.ConnectResponse:
        config = self._keeper.config
        return memsvc_pb2.ConnectResponse(
            welcome=memsvc_pb2.Welcome(
                memsvc_incarnation=self._keeper.incarnation,
                lease_ttl=translate.to_duration(config.lease_ttl),
                heartbeat_interval=translate.to_duration(config.heartbeat_interval),
            )
        )

    async def _read(self, requests: AsyncIterator[memsvc_pb2.ConnectRequest]) -> None:
        """Handles requests until they end."""
        try:
            async for request in requests:
                response = self._handle(request)
                self._keeper.heard()
                self._put(response)
                while len(self._waiting) > _READ_LIMIT:
                    self._room.clear()
                    await self._room.wait()
        except QuireError as error:
            self._error = self._error or error
        except Exception as error:  # noqa: BLE001 - handed to the stream's own task, where it becomes INTERNAL
            self._fail(error)
        finally:
            self._finished = True
            self._wake.set()

    def _fail(self, error: Exception) -> None:
        """Ends the stream with an error that is a defect."""
        wrapped = QuireError("internal error; the server's log has the details")
        wrapped.__cause__ = error
        self._error = self._error or wrapped

    def _handle(self, request: memsvc_pb2.ConnectRequest) -> memsvc_pb2.ConnectResponse:
        """Returns the response to one request."""
        self._keeper.core.touch_gateway(self._number, self._keeper.now)
        match request.WhichOneof("message"):
            case "journal":
                return self._journal(request.journal)
            case "admit":
                return self._answer(request.admit, self._admit)
            case "lease":
                return self._answer(request.lease, self._lease)
            case "fork":
                return self._answer(request.fork, self._fork)
            case "ping":
                return memsvc_pb2.ConnectResponse(pong=memsvc_pb2.Pong())
            case "hello":
                raise InvalidRequestError("message: hello may come only once", field="hello")
            case _:
                raise InvalidRequestError("message: is not set", field="message")

    def _answer(
        self, request: Request, handle: Callable[[Request], memsvc_pb2.ConnectResponse]
    ) -> memsvc_pb2.ConnectResponse:
        """Returns the answer that `handle` gives to a request, the same one if it was given before."""
        answer = self._answers.get(request.request_no)
        if answer is not None:
            return answer
        try:
            answer = handle(request)
        except QuireError as error:
            if error.reason == "STALE_GATEWAY":
                raise
            answer = translate.from_refusal(request.request_no, error)
        self._answers.put(request.request_no, answer)
        return answer

    def _admit(self, request: memsvc_pb2.AdmitRequest) -> memsvc_pb2.ConnectResponse:
        admission = self._keeper.core.admit(self._number, translate.to_admit(request), self._keeper.now)
        return translate.from_admission(request.request_no, admission)

    def _fork(self, request: memsvc_pb2.ForkRequest) -> memsvc_pb2.ConnectResponse:
        fork = self._keeper.core.fork(self._number, translate.to_fork(request), self._keeper.now)
        return translate.from_fork(request.request_no, fork)

    def _lease(self, request: memsvc_pb2.LeaseRequest) -> memsvc_pb2.ConnectResponse:
        core = self._keeper.core
        blocks = core.lease(self._number, request.pool_id, request.epoch, request.granted_total, self._keeper.now)
        return memsvc_pb2.ConnectResponse(
            lease_granted=memsvc_pb2.LeaseGranted(
                request_no=request.request_no,
                pool_id=request.pool_id,
                epoch=request.epoch,
                block_ids=columns.pack(blocks),
                granted_total=core.granted_total(self._number, request.pool_id),
            )
        )

    def _journal(self, journal: memsvc_pb2.Journal) -> memsvc_pb2.ConnectResponse:
        core = self._keeper.core
        if journal.pool_id not in core.pools:
            raise StaleEpochError(f"journal: no pool {journal.pool_id!r}", reason="POOL_NOT_FOUND")
        core.journal(
            self._number,
            journal.pool_id,
            journal.epoch,
            translate.to_journal(journal),
            self._keeper.now,
            journal_no=journal.journal_no,
        )
        return memsvc_pb2.ConnectResponse(
            journal_acknowledged=memsvc_pb2.JournalAcknowledged(
                pool_id=journal.pool_id, journal_no=core.journal_no(self._number, journal.pool_id)
            )
        )
