"""The engine of this gateway, in a process of its own, as a front uses it.

The front attaches, and attaches again whenever the engine is gone. What was under way then fails with UNAVAILABLE, and
so does what comes meanwhile: clients try again, and by then there is an engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
import hashlib
import itertools
from typing import TYPE_CHECKING, Final, TypeVar

from google.rpc import status_pb2
import grpc
import structlog

from gateway.core.step import LogprobRow
from gateway.delivery import Answer
from gateway.fronts.engine_service import HEARTBEAT_SECONDS, SILENCE_SECONDS
from gateway.fronts.requests import from_content, from_model, to_content, to_submit
from gateway.intake import draining_error, find_model
from gateway.models import ServedModel
from gateway.streams import RequestStream
from gateway.tokenize import ModelTokenizer, TokenizerFiles
from protos.gateway.v1 import engine_pb2 as pb
from protos.gateway.v1 import engine_pb2_grpc, gateway_pb2, gateway_pb2_grpc
from quire import columns, status
from quire.errors import AdmissionError, CorruptionError, NotReadyError, QuireError, RequestExistsError

if TYPE_CHECKING:
    from gateway.core.request import RequestSettings
    from gateway.core.session import Session

log = structlog.get_logger(__name__)

Response = TypeVar("Response")

_START_SECONDS: Final = 30.0
_TOKENIZER_SECONDS: Final = 60.0
_CANCEL_SECONDS: Final = 60.0
_TURN_SECONDS: Final = 10.0
_DRAIN_POLL_SECONDS: Final = 0.02
_RECONNECT_SECONDS: Final = (0.1, 0.2, 0.5)
_RETRY_SECONDS: Final = 1.0
_MOST_BYTES: Final = 4 * 2**20
"""Of a message to the engine, roughly: one call more may follow when it is reached."""


def engine_gone() -> NotReadyError:
    """Returns the error for what needs an engine while there is none."""
    message = "the gateway's engine is not connected; try again soon"
    return NotReadyError(message, reason="ENGINE_UNAVAILABLE", retry_after=_RETRY_SECONDS)


class RemoteEngine:
    """`gateway.intake.Intake` and `gateway.turns.Turns` on the engine's process.

    Args:
        channel: to the engine; closed with this.
        tenant_metadata: metadata key in which the tenant of a call is named.
        most_unsent: most calls that wait to be sent.
        on_readiness: hears whether any model can be served.
        on_fatal: hears of a defect after which the process must stop.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        tenant_metadata: str,
        most_unsent: int,
        on_readiness: Callable[[bool], None],
        on_fatal: Callable[[str], None],
    ) -> None:
        self._channel = channel
        self._stub = engine_pb2_grpc.EngineServiceStub(channel)
        self._generation = gateway_pb2_grpc.GenerationServiceStub(channel)
        self._tenant_metadata = tenant_metadata
        self._most_unsent = most_unsent
        self._on_readiness = on_readiness
        self._on_fatal = on_fatal
        self._keeper: asyncio.Task[None] | None = None
        self._learner: asyncio.Task[None] | None = None
        self._attached = False
        self._first_attached = asyncio.Event()
        self._ready = False
        self._engine_drains = False
        self._draining = False
        self._models: dict[str, ServedModel] = {}
        self._full_models: frozenset[str] = frozenset()
        self._numbers = itertools.count(1)
        self._streams: dict[int, RequestStream] = {}
        self._live: dict[str, int] = {}
        self._answers: dict[int, asyncio.Future[Session | None]] = {}
        self._turns: dict[str, int] = {}
        self._calls: list[pb.FrontCall] = []
        self._news = asyncio.Event()

    # --- life ---------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Attaches; where that takes long, goes on trying and returns."""
        self._keeper = asyncio.create_task(self._keep_attached(), name="engine-link")
        self._keeper.add_done_callback(self._keeper_done)
        try:
            await asyncio.wait_for(self._first_attached.wait(), _START_SECONDS)
        except TimeoutError:
            log.warning("engine_awaited", seconds=_START_SECONDS)

    def _keeper_done(self, task: asyncio.Task[None]) -> None:
        """The link only ends when it is cancelled: anything else is a defect."""
        if not task.cancelled():
            log.error("engine_link_failed", exc_info=task.exception())
            self._on_fatal(f"the link to the engine failed: {task.exception()!r}")

    async def drain(self) -> None:
        """Refuses new requests and waits until the live ones have ended."""
        self._draining = True
        while self._streams:  # noqa: ASYNC110 - ends are counted in one place; polling keeps the token path free of it
            await asyncio.sleep(_DRAIN_POLL_SECONDS)

    async def close(self) -> None:
        """Ends what still lives with UNAVAILABLE and detaches."""
        self._draining = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        await self._channel.close()

    async def _keep_attached(self) -> None:
        """Attaches, again and again."""
        attempt = 0
        while True:
            try:
                await self._attach()
                log.warning("engine_lost", reason="ENDED")
            except (grpc.aio.AioRpcError, QuireError, TimeoutError) as error:
                found = status.from_rpc_error(error) if isinstance(error, grpc.aio.AioRpcError) else error
                # One that was never there is starting; one that is gone is told of once.
                tell = log.warning if self._attached else log.debug
                tell("engine_lost", reason=type(found).__name__, message=str(found))
            finally:
                attempt = 0 if self._attached else attempt + 1
                await self._detach()
            await asyncio.sleep(_RECONNECT_SECONDS[min(attempt, len(_RECONNECT_SECONDS) - 1)])

    async def _attach(self) -> None:
        """Speaks with the engine until one of both is gone."""
        call = self._stub.Attach()
        writer = asyncio.create_task(self._write(call), name="engine-writer")
        try:
            while True:
                async with asyncio.timeout(SILENCE_SECONDS):
                    response = await call.read()
                if not isinstance(response, pb.AttachResponse):
                    return
                self._hear(response)
        finally:
            call.cancel()
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    async def _write(self, call: grpc.aio.StreamStreamCall[pb.AttachRequest, pb.AttachResponse]) -> None:
        """Sends what is asked, as it comes; nothing at all is a sign of life."""
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT_SECONDS):
                    await self._news.wait()
            except TimeoutError:
                pass
            self._news.clear()
            calls, self._calls = self._calls, []
            try:
                for request in _requests(calls):
                    async with asyncio.timeout(SILENCE_SECONDS):
                        await call.write(request)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError):
                # The reader sees why the stream ended, and that it has: the engine answers no more either way.
                log.debug("engine_write_failed")
                call.cancel()
                return

    async def _detach(self) -> None:
        """Fails everything that was under way."""
        if self._learner is not None:
            self._learner.cancel()
            await asyncio.gather(self._learner, return_exceptions=True)
            self._learner = None
        self._attached = False
        self._tell_readiness(ready=False)
        self._calls.clear()
        streams, self._streams = self._streams, {}
        self._live.clear()
        for stream in streams.values():
            stream.fail(draining_error() if self._draining else engine_gone())
            stream.release()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(engine_gone())
        self._answers.clear()
        self._turns.clear()

    # --- what the engine tells ----------------------------------------------------------------------------------

    def _hear(self, response: pb.AttachResponse) -> None:
        """Takes in a message: for the streams, what a lane tells them where there is one process only."""
        if response.HasField("state"):
            self._learn(response.state)
        self._full_models = frozenset(response.full_models)
        streams = self._streams
        if response.streams:
            numbers = columns.unpack_list(response.streams, "streams")
            tokens = columns.unpack_list(response.tokens, "tokens", row_count=len(numbers))
            samples = columns.unpack_list(response.samples, "samples") if response.samples else itertools.repeat(0)
            for number, sample, token in zip(numbers, samples, tokens, strict=False):
                stream = streams.get(number)
                if stream is not None:
                    stream.push(sample, token)
        for told in response.told:
            stream = streams.get(told.stream)
            if stream is not None:
                if told.HasField("logprob"):
                    stream.push_logprob(told.sample, _row(told.logprob))
                stream.push(told.sample, told.token, told.text if told.HasField("text") else None)
        for event in response.events:
            stream = streams.get(event.stream)
            if stream is not None:
                self._hear_event(event, stream)
        for turn in response.turns:
            self._hear_turn(turn)

    def _hear_event(self, event: pb.StreamEvent, stream: RequestStream) -> None:
        kind = event.WhichOneof("event")
        if kind == "admitted":
            stream.admitted(event.admitted)
        elif kind == "prompt":
            stream.prompt_logprobs([_row(row) for row in event.prompt.rows])
        elif kind == "end":
            stream.end(event.end.sample, event.end.ending, event.end.text)
        elif kind == "selection":
            stream.select(list(event.selection.samples))
        elif kind == "found":
            stream.answer(
                [
                    Answer(columns.unpack_list(found.tokens, "tokens"), found.shown_count, found.ending)
                    for found in event.found.completions
                ]
            )
        elif kind == "finished":
            stream.finish(event.finished.usage)
        elif kind == "status":
            stream.fail(status.from_status(status_pb2.Status.FromString(event.status)))
        elif kind == "released":
            del self._streams[event.stream]
            self._live.pop(stream.settings.request_id, None)
            stream.release()

    def _hear_turn(self, turn: pb.TurnAnswer) -> None:
        answer = self._answers.pop(turn.turn, None)
        if answer is None or answer.done():
            return
        kind = turn.WhichOneof("outcome")
        if kind == "status":
            answer.set_exception(status.from_status(status_pb2.Status.FromString(turn.status)))
        else:
            answer.set_result(from_content(turn.begun) if kind == "begun" else None)

    def _learn(self, state: pb.EngineState) -> None:
        """Takes in the engine's state, unless the last one is still being taken in: there is another one soon."""
        self._engine_drains = state.draining
        if self._learner is None or self._learner.done():
            self._learner = asyncio.create_task(self._learn_models(state), name="engine-models")
            self._learner.add_done_callback(self._learner_done)

    async def _learn_models(self, state: pb.EngineState) -> None:
        """Serves the models of the engine, once their tokenizers are here."""
        models = {}
        for message in state.models:
            known = self._models.get(message.model.name)
            tokenizer = known.tokenizer if known is not None else None
            wanted = (message.tokenizer_sha256, message.add_bos_token)
            if tokenizer is None or (tokenizer.files.sha256, tokenizer.add_bos_token) != wanted:
                files = await self._fetch_tokenizer(message.model.name)
                tokenizer = ModelTokenizer(files, add_bos_token=message.add_bos_token)
            models[message.model.name] = from_model(message, tokenizer)
        self._models = models
        if not self._attached:
            log.info("engine_attached", models=sorted(models))
        self._attached = True
        self._first_attached.set()
        self._tell_readiness(ready=state.ready and not state.draining)

    def _tell_readiness(self, *, ready: bool) -> None:
        if ready != self._ready:
            self._ready = ready
            self._on_readiness(ready)

    async def _fetch_tokenizer(self, model: str) -> TokenizerFiles:
        first: pb.GetTokenizerResponse | None = None
        chunks = []
        async for message in self._stub.GetTokenizer(pb.GetTokenizerRequest(model=model), timeout=_TOKENIZER_SECONDS):
            first = first or message
            chunks.append(message.chunk)
        if first is None:
            raise CorruptionError("the engine sent no tokenizer")
        data = b"".join(chunks)
        digest = hashlib.sha256(data).digest()
        return TokenizerFiles(data, digest, first.chat_template, first.bos_token, first.eos_token)

    def _learner_done(self, task: asyncio.Task[None]) -> None:
        """A tokenizer that did not come is asked for again with the next state; anything else is a defect."""
        if task.cancelled() or task.exception() is None:
            return
        error = task.exception()
        if isinstance(error, grpc.aio.AioRpcError | QuireError):
            log.warning("engine_models_unknown", message=str(error)[:500])
        else:
            log.error("engine_link_failed", exc_info=error)
            self._on_fatal(f"the engine's state could not be taken in: {error!r}")

    # --- requests: Intake ---------------------------------------------------------------------------------------

    def models(self) -> list[ServedModel]:
        """See Intake."""
        return [self._models[name] for name in sorted(self._models)]

    def find_model(self, name: str) -> ServedModel:
        """See Intake.

        Raises:
            NotReadyError: also while there is no engine.
        """
        self._require_engine()
        return find_model(self._models, name, draining=self._engine_drains)

    def _require_engine(self) -> None:
        """Raises NotReadyError unless there is an engine, and this front takes requests."""
        if self._draining:
            raise draining_error()
        if not self._attached:
            raise engine_gone()

    def check_request(self, request_id: str, model: str) -> None:
        """See Intake: what this front knows; the engine looks again."""
        if request_id in self._live:
            raise RequestExistsError(f"request_id: {request_id!r} is the id of a live request", field="request_id")
        if model in self._full_models:
            raise AdmissionError("the queue is full; try again later", retry_after=_RETRY_SECONDS)

    def submit(self, settings: RequestSettings) -> RequestStream:
        """See Intake: a refusal of the engine is the end of the stream."""
        self._require_engine()
        self.check_request(settings.request_id, settings.model)
        if len(self._calls) >= self._most_unsent:
            message = f"{len(self._calls)} calls wait for the engine, allowed are {self._most_unsent}; try again later"
            raise AdmissionError(message, retry_after=_RETRY_SECONDS)
        number = next(self._numbers)
        stream = RequestStream(settings, self._models[settings.model].tokenizer.token_bytes)
        self._streams[number] = stream
        self._live[settings.request_id] = number
        self._send(pb.FrontCall(submit=to_submit(number, settings)))
        return stream

    def abandon(self, stream: RequestStream) -> None:
        """See Intake."""
        number = self._live.get(stream.settings.request_id, 0)
        if self._streams.get(number) is stream and not stream.finished:
            self._send(pb.FrontCall(abandon=number))

    async def cancel_all(self, request_ids: Collection[str], tenant: str = "") -> set[str]:
        """See Intake: whichever front they came through."""
        request = gateway_pb2.CancelRequestsRequest(request_ids=request_ids)
        answer = await self.forward(self._generation.CancelRequests, request, tenant, _CANCEL_SECONDS)
        return set(answer.cancelled_request_ids)

    async def cancel(self, request_id: str, tenant: str = "") -> bool:
        """Cancels one request; see `cancel_all`."""
        return bool(await self.cancel_all([request_id], tenant))

    async def forward(
        self, method: Callable[..., Awaitable[Response]], request: object, tenant: str, seconds: float
    ) -> Response:
        """Has the engine answer a unary call of a public service; raises QuireError."""
        self._require_engine()
        metadata = ((self._tenant_metadata, tenant),) if self._tenant_metadata else ()
        try:
            return await method(request, timeout=seconds, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            found = status.from_rpc_error(error)
            # Without a delay it is the connection's own, not the engine's.
            lost = error.code() is grpc.StatusCode.UNAVAILABLE and found.retry_after is None
            raise (engine_gone() if lost else found) from error

    def _send(self, call: pb.FrontCall) -> None:
        self._calls.append(call)
        self._news.set()

    # --- turns of sessions: Turns -------------------------------------------------------------------------------

    async def begin(self, session_id: str) -> Session:
        """See Turns: the session is a copy, until it is kept."""
        self._require_engine()
        number = next(self._numbers)
        call = pb.FrontCall(begin_turn=pb.BeginTurn(turn=number, session_id=session_id))
        try:
            session = await self._ask(number, call)
        except (asyncio.CancelledError, TimeoutError):
            # Whatever the engine has answered, or will answer: this turn does not go on.
            self._send(pb.FrontCall(end_turn=pb.EndTurn(turn=number)))
            raise
        assert session is not None
        self._turns[session_id] = number
        return session

    async def keep(self, session: Session) -> None:
        """See Turns: the turn has ended then."""
        number = self._turns.pop(session.session_id, None)
        if number is None:
            raise engine_gone()
        await self._ask(number, pb.FrontCall(end_turn=pb.EndTurn(turn=number, kept=to_content(session))))

    async def end(self, session: Session) -> None:
        """See Turns."""
        number = self._turns.pop(session.session_id, None)
        if number is not None:
            await self._ask(number, pb.FrontCall(end_turn=pb.EndTurn(turn=number)))

    async def _ask(self, turn: int, call: pb.FrontCall) -> Session | None:
        """Sends a call about a turn and waits for the answer."""
        answer: asyncio.Future[Session | None] = asyncio.get_running_loop().create_future()
        self._answers[turn] = answer
        self._send(call)
        try:
            async with asyncio.timeout(_TURN_SECONDS):
                return await answer
        finally:
            self._answers.pop(turn, None)


def _requests(calls: list[pb.FrontCall]) -> list[pb.AttachRequest]:
    """Returns calls as messages of a bounded size; one without any, if there are none."""
    requests, size = [pb.AttachRequest()], 0
    for call in calls:
        if size > _MOST_BYTES:
            requests.append(pb.AttachRequest())
            size = 0
        requests[-1].calls.append(call)
        size += call.ByteSize()
    return requests


def _row(message: pb.LogprobRow) -> LogprobRow:
    """Returns a row of log-probabilities; whose it is, is known to whoever gets it."""
    token_ids = columns.unpack_list(message.token_ids, "token_ids")
    return LogprobRow(0, 0, message.rank, token_ids, columns.unpack_floats(message.values, "values"))
