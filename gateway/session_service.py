"""SessionService: conversations as RPCs."""

from __future__ import annotations

from array import array
import asyncio
import dataclasses
import math
import secrets
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc

from gateway.core.session import Message, Session, SessionTable, TurnEnd
from gateway.refusal import refusal
from gateway.tenants import tenant_of
from gateway.turns import TableTurns, Turns
from gateway.validation import chat_messages, check_for, check_request_id, check_text_length, encode_prompt
from protos.gateway.v1 import gateway_pb2, session_pb2_grpc
from protos.gateway.v1 import session_pb2 as pb
from quire.errors import InvalidRequestError

if TYPE_CHECKING:
    from gateway.config import GatewayConfig
    from gateway.core.request import RequestSettings
    from gateway.intake import Intake
    from gateway.models import ServedModel

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_FORK_LIMIT = 64
_PAGE_DEFAULT = 100
_PAGE_LIMIT = 1_000
_RETENTION_LIMIT = 2**19
_SCOPE_END = "/"
"""Ends the tenant in the table's ids; neither a tenant nor a client's id contains it."""


class SessionService(session_pb2_grpc.SessionServiceServicer):
    """Sessions on an engine.

    Args:
        engine: answers the turns.
        config: limits.
        turns: where turns begin and end; by default at the table of this service.
    """

    def __init__(self, engine: Intake, config: GatewayConfig, turns: Turns | None = None) -> None:
        self._engine = engine
        self._config = config
        self.table = SessionTable(config.max_sessions)
        self._turns: Turns = turns or TableTurns(self.table)

    def _scope(self, context: Context) -> str:
        """Returns what the table's ids of a call's tenant begin with: nobody reaches the sessions of another."""
        tenant = tenant_of(context, self._config.tenant_metadata)
        return f"{tenant}{_SCOPE_END}" if tenant else ""

    async def CreateSession(self, request: pb.CreateSessionRequest, context: Context) -> pb.CreateSessionResponse:
        """Opens an empty session."""
        session_id = self._scope(context) + (_checked_id(request.session_id) or secrets.token_hex(8))
        ttl = self._config.session_ttl
        if request.HasField("ttl"):
            ttl = request.ttl.ToNanoseconds() / 1e9
            if not 0 < ttl <= self._config.session_ttl:
                raise refusal("ttl", f"{ttl:g} s", f"more than 0, at most {self._config.session_ttl:g} s")
        model = self._engine.find_model(request.model)
        now = _now()
        return pb.CreateSessionResponse(session=_message(self.table.create(session_id, model.name, ttl, now), now))

    async def AppendSession(self, request: pb.AppendSessionRequest, context: Context) -> None:  # type: ignore[override]
        """Adds a turn and streams the answer; writes, as GenerateStream does."""
        scope = self._scope(context)
        session = await self._turns.begin(scope + request.session_id)
        try:
            turn = await self._prepare(session, request.turn)
            turn.settings = dataclasses.replace(turn.settings, tenant=scope.removesuffix(_SCOPE_END))
            await self._answer(session, turn, context)
        finally:
            await self._turns.end(session)

    async def _prepare(self, session: Session, spec: gateway_pb2.GenerationSpec) -> _Turn:
        """Returns what a turn adds and how it is to be answered; raises QuireError."""
        if spec.model not in {"", session.model}:
            raise refusal("turn.model", repr(spec.model), f"{session.model!r}, the session's, or none")
        if max(spec.sampling.n, spec.sampling.best_of) > 1:
            raise refusal(
                "turn.sampling.n", max(spec.sampling.n, spec.sampling.best_of), "1: fork the session for more"
            )
        model = self._engine.find_model(session.model)
        self._engine.check_request(check_request_id(spec.request_id), model.name)
        prompt, messages, text = await _grow(session, spec, model)
        settings = await check_for(self._config, spec, model, prompt)
        retention = min(_RETENTION_LIMIT, math.ceil(session.ttl))
        settings = dataclasses.replace(settings, session_id=session.session_id, retention_ttl=retention)
        return _Turn(model, settings, messages, text)

    async def _answer(self, session: Session, turn: _Turn, context: Context) -> None:
        """Generates the answer; once it is whole the turn is part of the session, before the client hears the end."""
        stream = self._engine.submit(turn.settings)
        try:
            while messages := await stream.take():
                for message in messages:
                    for sample in message.delta.samples:
                        turn.add(sample)
                    if message.HasField("finished") and turn.complete:
                        # What is in the last block can be found only once the table is closed.
                        await stream.wait_released()
                        turn.keep(session)
                        await self._turns.keep(session)
                    await context.write(pb.AppendSessionResponse(event=message))
        finally:
            self._engine.abandon(stream)

    async def ForkSession(self, request: pb.ForkSessionRequest, context: Context) -> pb.ForkSessionResponse:
        """Opens sessions that begin with the same tokens."""
        count = request.count if request.HasField("count") else 1
        if not 1 <= count <= _FORK_LIMIT:
            raise refusal("count", count, f"1 .. {_FORK_LIMIT}")
        at_token = request.at_token if request.HasField("at_token") else None
        now = _now()
        scope = self._scope(context)
        new_ids = [scope + secrets.token_hex(8) for _ in range(count)]
        forks = self.table.fork(scope + request.session_id, new_ids, at_token, now)
        return pb.ForkSessionResponse(sessions=[_message(fork, now) for fork in forks])

    async def GetSession(self, request: pb.GetSessionRequest, context: Context) -> pb.GetSessionResponse:
        """Returns one session."""
        now = _now()
        return pb.GetSessionResponse(
            session=_message(self.table.get(self._scope(context) + request.session_id, now), now)
        )

    async def ListSessions(self, request: pb.ListSessionsRequest, context: Context) -> pb.ListSessionsResponse:
        """Lists sessions by id."""
        size = request.page_size or _PAGE_DEFAULT
        if size > _PAGE_LIMIT:
            raise refusal("page_size", size, f"1 .. {_PAGE_LIMIT}")
        now = _now()
        scope = self._scope(context)
        found = self.table.page(scope + request.page_token, size + 1, now)
        # Ids with one beginning follow each other.
        found = [session for session in found if session.session_id.startswith(scope)]
        return pb.ListSessionsResponse(
            sessions=[_message(session, now) for session in found[:size]],
            next_page_token=_own_id(found[size - 1]) if len(found) > size else "",
        )

    async def DeleteSession(self, request: pb.DeleteSessionRequest, context: Context) -> pb.DeleteSessionResponse:
        """Ends a session."""
        self.table.delete(self._scope(context) + request.session_id, _now())
        return pb.DeleteSessionResponse()


class _Turn:
    """A turn under way."""

    def __init__(self, model: ServedModel, settings: RequestSettings, messages: list[Message], text: str) -> None:
        self.settings = settings
        self._model = model
        self._messages = messages
        self._text = text
        self._answer: list[str] = []
        self._tokens = array("I")
        self._reason = gateway_pb2.FINISH_REASON_UNSPECIFIED

    def add(self, sample: gateway_pb2.SampleDelta) -> None:
        """Notes a piece of the answer."""
        self._answer.append(sample.text)
        self._tokens.extend(sample.token_ids)
        if sample.HasField("ending"):
            self._reason = sample.ending.reason

    @property
    def complete(self) -> bool:
        """Whether the answer has ended by itself."""
        return self._reason not in {gateway_pb2.FINISH_REASON_UNSPECIFIED, gateway_pb2.FINISH_REASON_CANCELLED}

    def keep(self, session: Session) -> None:
        """Makes the turn part of the session."""
        session.tokens = self.settings.prompt + self._tokens
        answer, written = "".join(self._answer), self._model.tokenizer.written(self._tokens)
        if self._messages:
            session.messages += [*self._messages, Message("assistant", answer)]
            session.text = self._text + written
        elif session.is_chat:
            # It went on where its last answer had ended.
            last = session.messages.pop()
            session.messages.append(Message(last.role, last.content + answer))
            session.text += written
        session.turns.append(TurnEnd(len(session.tokens), len(session.messages), len(session.text)))


async def _grow(
    session: Session, spec: gateway_pb2.GenerationSpec, model: ServedModel
) -> tuple[array[int], list[Message], str]:
    """Returns the session's tokens with those of a turn; of a chat also the new messages, and what all of it spells.

    Raises:
        InvalidRequestError: there is nothing to continue, or a chat is to be continued as text, or the other way round.
        PromptTooLongError: it is far longer than the model could hold.
    """
    kind = spec.WhichOneof("prompt")
    if kind is None and session.tokens:
        return session.tokens, [], ""
    if kind in {"text", "token_ids"} and session.is_chat:
        raise refusal(f"turn.{kind}", "a text", "messages (chat): the session is a chat; fork it to go on as text")
    if kind == "chat":
        if session.tokens and not session.is_chat:
            raise refusal("turn.chat", "messages", "text or token_ids: the session is no chat")
        new = [Message(message["role"], message["content"]) for message in chat_messages(spec.chat)]
        whole = (*session.messages, *new)
        check_text_length("turn.chat", sum(len(message.content) for message in whole), model)
        rendered = model.tokenizer.render_chat([message._asdict() for message in whole])
        if session.tokens and rendered.startswith(session.text):
            return session.tokens + await model.tokenizer.encode_more(rendered[len(session.text) :]), new, rendered
        # The template writes the conversation otherwise than it was said: what is equal is found in the cache.
        return await model.tokenizer.encode_more(rendered), new, rendered
    if kind == "text" and session.tokens and spec.text:
        check_text_length("turn.text", len(spec.text), model)
        return session.tokens + await model.tokenizer.encode_more(spec.text), [], ""
    return session.tokens + await encode_prompt(spec, model), [], ""


def _checked_id(session_id: str) -> str:
    """Returns a session's id, which may be empty; raises InvalidRequestError."""
    if not session_id:
        return ""
    try:
        return check_request_id(session_id)
    except InvalidRequestError as error:
        raise refusal("session_id", repr(session_id[:140]), "1 .. 128 characters of A-Z a-z 0-9 . _ : -") from error


def _now() -> float:
    return asyncio.get_running_loop().time()


def _own_id(session: Session) -> str:
    """Returns a session's id as its tenant knows it."""
    return session.session_id.rpartition(_SCOPE_END)[2]


def _message(session: Session, now: float) -> pb.Session:
    """Returns a session as it is answered."""
    message = pb.Session(
        session_id=_own_id(session),
        model=session.model,
        token_count=len(session.tokens),
        turn_count=len(session.turns),
        busy=session.busy,
        parent_session_id=session.parent_id.rpartition(_SCOPE_END)[2],
    )
    message.ttl.FromNanoseconds(int(session.ttl * 1e9))
    message.expires_in.FromNanoseconds(max(0, int((session.expires_at - now) * 1e9)))
    return message
