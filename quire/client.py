"""The client: `Client` for plain programs, `AsyncClient` for asyncio.

    from quire import Client

    with Client("127.0.0.1:50051") as client:
        for text in client.stream("Once upon a time", max_tokens=64, temperature=0).text():
            print(text, end="", flush=True)

Every failure is the QuireError that the server raised (`quire.errors`); a server that cannot be reached is a
NotReadyError with the reason UNREACHABLE. Each call has a deadline. A stream that is closed or abandoned is cancelled
at the server, which frees its memory within one step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Final, Self, TypeVar, Unpack

import grpc

from protos.gateway.v1 import gateway_pb2, gateway_pb2_grpc, session_pb2, session_pb2_grpc
from quire import generation, status
from quire import session as sessions
from quire.errors import NotReadyError, QuireError, RequestCancelledError, UnsupportedError
from quire.generation import (
    Cancellation,
    Delta,
    Event,
    Generation,
    Messages,
    Model,
    Options,
    Prompt,
    TokenCount,
)
from quire.rpc import CHANNEL_OPTIONS, REQUEST_ID_KEY, open_channel
from quire.session import Session, session_from
from quire.transcript import Transcript

DEFAULT_ADDRESS: Final = "127.0.0.1:50051"
DEFAULT_TIMEOUT: Final = 600.0
"""Seconds that a call may take."""

_Answer = TypeVar("_Answer")


def as_quire_error(error: grpc.RpcError, address: str, *, started: bool = False) -> QuireError:
    """Returns what a failed call means to a user.

    Args:
        error: as raised by grpc.
        address: of the server that was called.
        started: the server had begun to answer.
    """
    found = status.from_rpc_error(error)
    if found.code is grpc.StatusCode.UNIMPLEMENTED and found.reason == "UNIMPLEMENTED":
        return UnsupportedError(f"the service at {address} has no such method", reason="METHOD_UNKNOWN")
    # Without our details the status was made by the transport, not by a server of ours.
    if found.code is grpc.StatusCode.UNAVAILABLE and found.reason == "UNAVAILABLE":
        if started:
            return NotReadyError(f"the connection to {address} was lost", reason="CONNECTION_LOST")
        return NotReadyError(f"nothing answers at {address}", reason="UNREACHABLE")
    return found


def _metadata(spec: gateway_pb2.GenerationSpec) -> tuple[tuple[str, str], ...]:
    """Returns the call's metadata: the id of the request, so that logs name it. An odd id is the server's to refuse."""
    plain = spec.request_id.isascii() and spec.request_id.isprintable()
    return ((REQUEST_ID_KEY, spec.request_id),) if plain else ()


class _StreamState:
    """What both kinds of stream keep: the transcript, events not yet handed out, and how it ended."""

    def __init__(self, call: Any, request_id: str, address: str) -> None:
        self._call = call
        self._address = address
        self._closed = False
        self._pending: deque[Event] = deque()
        self._transcript = Transcript(request_id)

    @property
    def request_id(self) -> str:
        """Name of the request, for `cancel` and for logs."""
        return self._transcript.request_id

    @property
    def admitted(self) -> generation.Admitted | None:
        """What the server said at admission, once it has."""
        return self._transcript.admitted

    @property
    def usage(self) -> generation.Usage | None:
        """What the request cost, once it has finished."""
        return self._transcript.usage

    def _accept(self, response: gateway_pb2.GenerateStreamResponse | session_pb2.AppendSessionResponse) -> None:
        """Notes one message; its events wait to be handed out."""
        if isinstance(response, session_pb2.AppendSessionResponse):
            response = response.event
        for event in generation.events_from(response):
            self._transcript.add(event)
            self._pending.append(event)

    def _failure(self, error: grpc.RpcError) -> QuireError | None:
        """Returns what to raise for a failed call; None if it failed because we closed it."""
        found = as_quire_error(error, self._address, started=self.admitted is not None)
        return None if self._closed and isinstance(found, RequestCancelledError) else found

    def _whole(self) -> Generation:
        """Returns the whole answer of a stream that has ended."""
        whole = self._transcript.generation()
        if whole is None:
            raise RequestCancelledError("the stream was closed before it finished")
        return whole

    def _cancel(self) -> None:
        """Cancels the call at the server; does nothing after its end."""
        self._closed = True
        self._call.cancel()

    def __del__(self) -> None:
        """Cancels an abandoned stream."""
        if "_call" in self.__dict__:
            self._call.cancel()


class Stream(_StreamState):
    """One answer as it is made: iterate for events, or over `text()`. Closing it cancels the request."""

    def __iter__(self) -> Iterator[Event]:
        """Yields the events: `Admitted`, then `Delta`s, then `Finished`."""
        return self

    def __next__(self) -> Event:
        """Returns the next event; raises the QuireError that the server raised."""
        while not self._pending:
            try:
                self._accept(next(self._call))
            except grpc.RpcError as error:
                failure = self._failure(error)
                if failure is None:
                    raise StopIteration from None
                raise failure from None
        return self._pending.popleft()

    def text(self, index: int = 0) -> Iterator[str]:
        """Yields the new text of sample `index`."""
        for event in self:
            if isinstance(event, Delta) and event.index == index and event.text:
                yield event.text

    def result(self) -> Generation:
        """Waits for the end and returns the whole answer, deltas already handed out included."""
        for _ in self:
            pass
        return self._whole()

    def close(self) -> None:
        """Cancels the request if it still runs."""
        self._cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncStream(_StreamState):
    """`Stream` for asyncio."""

    def __aiter__(self) -> AsyncIterator[Event]:
        """Yields the events: `Admitted`, then `Delta`s, then `Finished`."""
        return self

    async def __anext__(self) -> Event:
        """Returns the next event; raises the QuireError that the server raised."""
        while not self._pending:
            try:
                response = await self._call.read()
            except grpc.RpcError as error:
                failure = self._failure(error)
                if failure is None:
                    raise StopAsyncIteration from None
                raise failure from None
            if response is grpc.aio.EOF:
                raise StopAsyncIteration
            self._accept(response)
        return self._pending.popleft()

    async def text(self, index: int = 0) -> AsyncIterator[str]:
        """Yields the new text of sample `index`."""
        async for event in self:
            if isinstance(event, Delta) and event.index == index and event.text:
                yield event.text

    async def result(self) -> Generation:
        """Waits for the end and returns the whole answer, deltas already handed out included."""
        async for _ in self:
            pass
        return self._whole()

    def close(self) -> None:
        """Cancels the request if it still runs."""
        self._cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


class Client:
    """A connection to a gateway. Safe to use from several threads; needs no event loop.

    Args:
        address: "host:port" of the gateway.
        timeout: seconds that a call may take unless it says otherwise.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        self.address = address
        self._timeout = timeout
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = gateway_pb2_grpc.GenerationServiceStub(self._channel)
        self._sessions = session_pb2_grpc.SessionServiceStub(self._channel)

    def generate(self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Options]) -> Generation:
        """Returns the whole completion of a text or of token ids."""
        return self._generate(generation.specification(prompt, None, options), timeout)

    def chat(self, messages: Messages, *, timeout: float | None = None, **options: Unpack[Options]) -> Generation:
        """Returns the whole answer to a conversation, rendered by the model's chat template."""
        return self._generate(generation.specification(None, messages, options), timeout)

    def stream(self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Options]) -> Stream:
        """Starts a completion of a text or of token ids and returns its stream."""
        return self._stream(generation.specification(prompt, None, options), timeout)

    def stream_chat(self, messages: Messages, *, timeout: float | None = None, **options: Unpack[Options]) -> Stream:
        """Starts an answer to a conversation and returns its stream."""
        return self._stream(generation.specification(None, messages, options), timeout)

    def count_tokens(self, prompt: str | Messages, *, model: str = "", timeout: float | None = None) -> TokenCount:
        """Returns the tokens that a text or a conversation takes. Computes nothing."""
        wire = self._call(self._stub.CountTokens, generation.count_request(prompt, model), timeout)
        return TokenCount(wire.token_count, tuple(wire.token_ids))

    def models(self, *, timeout: float | None = None) -> tuple[Model, ...]:
        """Returns the models that are served."""
        return generation.models_from(self._call(self._stub.ListModels, gateway_pb2.ListModelsRequest(), timeout))

    def cancel(self, *request_ids: str, timeout: float | None = None) -> Cancellation:
        """Cancels requests and returns when their blocks are back in the pool."""
        request = gateway_pb2.CancelRequestsRequest(request_ids=request_ids)
        wire = self._call(self._stub.CancelRequests, request, timeout)
        return Cancellation(tuple(wire.cancelled_request_ids), tuple(wire.unknown_request_ids))

    def create_session(
        self, session_id: str = "", *, model: str = "", ttl: float | None = None, timeout: float | None = None
    ) -> Session:
        """Opens a conversation that the gateway keeps, until it had no turn for `ttl` seconds."""
        request = sessions.create_request(session_id, model, ttl)
        return session_from((self._call(self._sessions.CreateSession, request, timeout)).session)

    def append(
        self, session_id: str, turn: Prompt | None = None, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Stream:
        """Adds a text, or token ids, to a session and returns the stream of the answer; None to go on as it is."""
        return self._append(session_id, generation.specification(turn, None, options), timeout)

    def append_chat(
        self, session_id: str, messages: Messages, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Stream:
        """Adds messages to a session and returns the stream of the answer."""
        return self._append(session_id, generation.specification(None, messages, options), timeout)

    def fork_session(
        self, session_id: str, count: int = 1, at_token: int | None = None, *, timeout: float | None = None
    ) -> tuple[Session, ...]:
        """Opens sessions that begin with the same tokens, or with the first `at_token` of them. Copies nothing."""
        request = sessions.fork_request(session_id, count, at_token)
        wire = self._call(self._sessions.ForkSession, request, timeout)
        return tuple(session_from(session) for session in wire.sessions)

    def session(self, session_id: str, *, timeout: float | None = None) -> Session:
        """Returns a session as it is now."""
        request = session_pb2.GetSessionRequest(session_id=session_id)
        return session_from((self._call(self._sessions.GetSession, request, timeout)).session)

    def list_sessions(self, *, timeout: float | None = None) -> tuple[Session, ...]:
        """Returns all sessions, by id."""
        found: list[Session] = []
        request = session_pb2.ListSessionsRequest(page_size=1000)
        while True:
            wire = self._call(self._sessions.ListSessions, request, timeout)
            found += map(session_from, wire.sessions)
            if not wire.next_page_token:
                return tuple(found)
            request.page_token = wire.next_page_token

    def delete_session(self, session_id: str, *, timeout: float | None = None) -> None:
        """Ends a session."""
        self._call(self._sessions.DeleteSession, session_pb2.DeleteSessionRequest(session_id=session_id), timeout)

    def _generate(self, spec: gateway_pb2.GenerationSpec, timeout: float | None) -> Generation:
        request = gateway_pb2.GenerateRequest(spec=spec)
        return generation.generation_from(self._call(self._stub.Generate, request, timeout, _metadata(spec)))

    def _stream(self, spec: gateway_pb2.GenerationSpec, timeout: float | None) -> Stream:
        request = gateway_pb2.GenerateStreamRequest(spec=spec)
        seconds = self._timeout if timeout is None else timeout
        call = self._stub.GenerateStream(request, timeout=seconds, metadata=_metadata(spec))
        return Stream(call, spec.request_id, self.address)

    def _append(self, session_id: str, spec: gateway_pb2.GenerationSpec, timeout: float | None) -> Stream:
        request = session_pb2.AppendSessionRequest(session_id=session_id, turn=spec)
        seconds = self._timeout if timeout is None else timeout
        call = self._sessions.AppendSession(request, timeout=seconds, metadata=_metadata(spec))
        return Stream(call, spec.request_id, self.address)

    def _call(
        self, method: Callable[..., _Answer], request: object, timeout: float | None, metadata: object = None
    ) -> _Answer:
        """Calls a unary method with a deadline; raises QuireError."""
        try:
            return method(request, timeout=self._timeout if timeout is None else timeout, metadata=metadata)
        except grpc.RpcError as error:
            raise as_quire_error(error, self.address) from None

    def close(self) -> None:
        """Closes the connection; calls that still run are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient:
    """`Client` for asyncio. Belongs to the event loop that it is first used in.

    Args:
        address: "host:port" of the gateway.
        timeout: seconds that a call may take unless it says otherwise.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        self.address = address
        self._timeout = timeout
        self._channel = open_channel(address)
        self._stub = gateway_pb2_grpc.GenerationServiceStub(self._channel)
        self._sessions = session_pb2_grpc.SessionServiceStub(self._channel)

    async def generate(self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Options]) -> Generation:
        """Returns the whole completion of a text or of token ids."""
        return await self._generate(generation.specification(prompt, None, options), timeout)

    async def chat(self, messages: Messages, *, timeout: float | None = None, **options: Unpack[Options]) -> Generation:
        """Returns the whole answer to a conversation, rendered by the model's chat template."""
        return await self._generate(generation.specification(None, messages, options), timeout)

    def stream(self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Options]) -> AsyncStream:
        """Starts a completion of a text or of token ids and returns its stream."""
        return self._stream(generation.specification(prompt, None, options), timeout)

    def stream_chat(
        self, messages: Messages, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> AsyncStream:
        """Starts an answer to a conversation and returns its stream."""
        return self._stream(generation.specification(None, messages, options), timeout)

    async def count_tokens(
        self, prompt: str | Messages, *, model: str = "", timeout: float | None = None
    ) -> TokenCount:
        """Returns the tokens that a text or a conversation takes. Computes nothing."""
        wire = await self._call(self._stub.CountTokens, generation.count_request(prompt, model), timeout)
        return TokenCount(wire.token_count, tuple(wire.token_ids))

    async def models(self, *, timeout: float | None = None) -> tuple[Model, ...]:
        """Returns the models that are served."""
        wire = await self._call(self._stub.ListModels, gateway_pb2.ListModelsRequest(), timeout)
        return generation.models_from(wire)

    async def cancel(self, *request_ids: str, timeout: float | None = None) -> Cancellation:
        """Cancels requests and returns when their blocks are back in the pool."""
        request = gateway_pb2.CancelRequestsRequest(request_ids=request_ids)
        wire = await self._call(self._stub.CancelRequests, request, timeout)
        return Cancellation(tuple(wire.cancelled_request_ids), tuple(wire.unknown_request_ids))

    async def create_session(
        self, session_id: str = "", *, model: str = "", ttl: float | None = None, timeout: float | None = None
    ) -> Session:
        """Opens a conversation that the gateway keeps, until it had no turn for `ttl` seconds."""
        request = sessions.create_request(session_id, model, ttl)
        return session_from((await self._call(self._sessions.CreateSession, request, timeout)).session)

    def append(
        self, session_id: str, turn: Prompt | None = None, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> AsyncStream:
        """Adds a text, or token ids, to a session and returns the stream of the answer; None to go on as it is."""
        return self._append(session_id, generation.specification(turn, None, options), timeout)

    def append_chat(
        self, session_id: str, messages: Messages, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> AsyncStream:
        """Adds messages to a session and returns the stream of the answer."""
        return self._append(session_id, generation.specification(None, messages, options), timeout)

    async def fork_session(
        self, session_id: str, count: int = 1, at_token: int | None = None, *, timeout: float | None = None
    ) -> tuple[Session, ...]:
        """Opens sessions that begin with the same tokens, or with the first `at_token` of them. Copies nothing."""
        request = sessions.fork_request(session_id, count, at_token)
        wire = await self._call(self._sessions.ForkSession, request, timeout)
        return tuple(session_from(session) for session in wire.sessions)

    async def session(self, session_id: str, *, timeout: float | None = None) -> Session:
        """Returns a session as it is now."""
        request = session_pb2.GetSessionRequest(session_id=session_id)
        return session_from((await self._call(self._sessions.GetSession, request, timeout)).session)

    async def list_sessions(self, *, timeout: float | None = None) -> tuple[Session, ...]:
        """Returns all sessions, by id."""
        found: list[Session] = []
        request = session_pb2.ListSessionsRequest(page_size=1000)
        while True:
            wire = await self._call(self._sessions.ListSessions, request, timeout)
            found += map(session_from, wire.sessions)
            if not wire.next_page_token:
                return tuple(found)
            request.page_token = wire.next_page_token

    async def delete_session(self, session_id: str, *, timeout: float | None = None) -> None:
        """Ends a session."""
        await self._call(self._sessions.DeleteSession, session_pb2.DeleteSessionRequest(session_id=session_id), timeout)

    async def _generate(self, spec: gateway_pb2.GenerationSpec, timeout: float | None) -> Generation:
        request = gateway_pb2.GenerateRequest(spec=spec)
        return generation.generation_from(await self._call(self._stub.Generate, request, timeout, _metadata(spec)))

    def _stream(self, spec: gateway_pb2.GenerationSpec, timeout: float | None) -> AsyncStream:
        request = gateway_pb2.GenerateStreamRequest(spec=spec)
        seconds = self._timeout if timeout is None else timeout
        call = self._stub.GenerateStream(request, timeout=seconds, metadata=_metadata(spec))
        return AsyncStream(call, spec.request_id, self.address)

    def _append(self, session_id: str, spec: gateway_pb2.GenerationSpec, timeout: float | None) -> AsyncStream:
        request = session_pb2.AppendSessionRequest(session_id=session_id, turn=spec)
        seconds = self._timeout if timeout is None else timeout
        call = self._sessions.AppendSession(request, timeout=seconds, metadata=_metadata(spec))
        return AsyncStream(call, spec.request_id, self.address)

    async def _call(
        self, method: Callable[..., Awaitable[_Answer]], request: object, timeout: float | None, metadata: object = None
    ) -> _Answer:
        """Calls a unary method with a deadline; raises QuireError."""
        try:
            return await method(request, timeout=self._timeout if timeout is None else timeout, metadata=metadata)
        except grpc.RpcError as error:
            raise as_quire_error(error, self.address) from None

    async def close(self) -> None:
        """Closes the connection; calls that still run are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
