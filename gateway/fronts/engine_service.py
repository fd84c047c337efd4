"""EngineService: the engine's end of the streams that its fronts have attached."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import grpc
import structlog

from gateway.fronts.outbox import FrontStream, Outbox
from gateway.fronts.requests import from_submit, to_content, to_model, update_session
from gateway.tokenize import TokenizerFiles
from protos.gateway.v1 import engine_pb2 as pb
from protos.gateway.v1 import engine_pb2_grpc
from quire import status
from quire.errors import DeadlineError, InvalidRequestError, QuireError

if TYPE_CHECKING:
    from gateway.core.session import Session, SessionTable
    from gateway.engine import Engine

log = structlog.get_logger(__name__)

HEARTBEAT_SECONDS: Final = 0.5
"""Most time without a message, in both directions."""
SILENCE_SECONDS: Final = 10.0
"""After so much of it the other side counts as gone."""
_CHUNK_BYTES: Final = 2**20

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class EngineService(engine_pb2_grpc.EngineServiceServicer):
    """Serves fronts.

    Args:
        engine: runs their requests.
        table: their sessions.
    """

    def __init__(self, engine: Engine, table: SessionTable) -> None:
        self._engine = engine
        self._table = table
        self._fronts: set[_Front] = set()

    def tell_state(self) -> None:
        """Lets every front know what is served, and whether."""
        state = self._state()
        for front in self._fronts:
            front.outbox.tell_state(state)

    def _state(self) -> pb.EngineState:
        engine = self._engine
        models = [to_model(model) for model in engine.models()]
        return pb.EngineState(ready=engine.ready, draining=engine.draining, models=models)

    async def Attach(self, request_iterator: AsyncIterator[pb.AttachRequest], context: Context) -> None:  # type: ignore[override]
        """Serves one front until it is gone; then its requests are cancelled and its turns end."""
        front = _Front(self._engine, self._table)
        self._fronts.add(front)
        reader = asyncio.create_task(front.read(request_iterator), name="front-reader")
        reader.add_done_callback(lambda _: front.outbox.news.set())
        log.info("front_attached", front_count=len(self._fronts))
        try:
            front.outbox.tell_state(self._state())
            while not reader.done():
                await self._send(front.outbox, context)
            reader.result()
        finally:
            # A call that ends by itself may be cancelled on its way: the front is gone all the same.
            reader.cancel()
            try:
                await asyncio.gather(reader, return_exceptions=True)
            finally:
                self._fronts.discard(front)
                front.close()
            log.info("front_detached", front_count=len(self._fronts))

    async def _send(self, outbox: Outbox, context: Context) -> None:
        """Sends what there is, or the state when nothing has happened for long.

        Raises:
            DeadlineError: the front does not take it.
        """
        try:
            async with asyncio.timeout(HEARTBEAT_SECONDS):
                await outbox.news.wait()
        except TimeoutError:
            outbox.tell_state(self._state())
        full = self._engine.full_models()
        try:
            for message in outbox.take():
                message.full_models.extend(full)
                async with asyncio.timeout(SILENCE_SECONDS):
                    await context.write(message)
        except TimeoutError:
            raise DeadlineError(f"the front has taken nothing for {SILENCE_SECONDS:g} s") from None

    async def GetTokenizer(
        self, request: pb.GetTokenizerRequest, context: Context
    ) -> AsyncIterator[pb.GetTokenizerResponse]:
        """Streams the tokenizer of a model."""
        files: TokenizerFiles = self._engine.find_model(request.model).tokenizer.files
        yield pb.GetTokenizerResponse(
            chat_template=files.chat_template, bos_token=files.bos_token, eos_token=files.eos_token
        )
        for start in range(0, len(files.tokenizer_json), _CHUNK_BYTES):
            yield pb.GetTokenizerResponse(chunk=files.tokenizer_json[start : start + _CHUNK_BYTES])


class _Front:
    """One attached front: its requests and its turns."""

    def __init__(self, engine: Engine, table: SessionTable) -> None:
        self.outbox = Outbox()
        self._engine = engine
        self._table = table
        self._streams: dict[int, FrontStream] = {}
        self._turns: dict[int, Session] = {}

    async def read(self, requests: AsyncIterator[pb.AttachRequest]) -> None:
        """Does what the front asks, until it ends the stream.

        Raises:
            DeadlineError: it has been silent for too long.
        """
        while True:
            try:
                async with asyncio.timeout(SILENCE_SECONDS):
                    request = await anext(requests, None)
            except TimeoutError:
                raise DeadlineError(f"the front has been silent for {SILENCE_SECONDS:g} s") from None
            if request is None:
                return
            for call in request.calls:
                self._take(call)

    def _take(self, call: pb.FrontCall) -> None:
        kind = call.WhichOneof("call")
        if kind == "submit":
            self._submit(call.submit)
        elif kind == "abandon":
            stream = self._streams.get(call.abandon)
            if stream is not None:
                self._engine.abandon_request(stream.request_id, stream)
        elif kind == "begin_turn":
            self._begin_turn(call.begin_turn)
        elif kind == "end_turn":
            self._end_turn(call.end_turn)

    def _submit(self, submit: pb.Submit) -> None:
        """Starts a request; what is wrong with it is told on its stream."""
        number = submit.stream
        if number in self._streams:
            raise InvalidRequestError(f"stream: {number} is in use; numbers are used once", field="stream")
        stream = FrontStream(number, submit.request_id, self.outbox, self._streams.pop)
        self._streams[number] = stream
        try:
            self._engine.find_model(submit.model)
            self._engine.start_request(from_submit(submit), stream)
        except QuireError as error:
            stream.fail(error)
            stream.release()

    def _begin_turn(self, begin: pb.BeginTurn) -> None:
        answer = pb.TurnAnswer(turn=begin.turn)
        try:
            session = self._table.begin_turn(begin.session_id, asyncio.get_running_loop().time())
        except QuireError as error:
            answer.status = status.to_status(error).SerializeToString()
        else:
            self._turns[begin.turn] = session
            answer.begun.CopyFrom(to_content(session))
        self.outbox.answer_turn(answer)

    def _end_turn(self, end: pb.EndTurn) -> None:
        session = self._turns.pop(end.turn, None)
        if session is not None:
            if end.HasField("kept"):
                update_session(session, end.kept)
            self._table.end_turn(session, asyncio.get_running_loop().time())
        self.outbox.answer_turn(pb.TurnAnswer(turn=end.turn))

    def close(self) -> None:
        """The front is gone: nobody waits for its requests any more."""
        for stream in tuple(self._streams.values()):
            self._engine.abandon_request(stream.request_id, stream)
        now = asyncio.get_running_loop().time()
        for session in self._turns.values():
            self._table.end_turn(session, now)
        self._turns.clear()
