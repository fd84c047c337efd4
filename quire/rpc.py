"""What every gRPC server and channel of Quire shares: options, error mapping, malformed messages, request ids.

A handler raises QuireError and the caller gets its status with details. A message that does not parse is
INVALID_ARGUMENT (grpcio alone answers UNKNOWN with Python text). Anything else that a handler raises is INTERNAL with
no inner text, and is logged.

Streaming handlers are async generators, or coroutines that write to the context; request streams are async iterators.
A generator is closed before its call ends, whatever ends it: what it holds, it lets go of at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
import contextlib
import inspect
from typing import Any, Final

from google.protobuf.message import DecodeError
import grpc
import structlog

from quire import status
from quire.errors import DeadlineError, InvalidRequestError, QuireError

log = structlog.get_logger(__name__)

MAX_MESSAGE_BYTES: Final = 16 * 2**20
PRIVATE_MESSAGE_BYTES: Final = 64 * 2**20
REQUEST_ID_KEY: Final = "x-quire-request-id"


def _limits(message_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", message_bytes),
        ("grpc.max_send_message_length", message_bytes),
    ]


_SERVER: Final = [
    # Clients ping idle connections every 10 s or more: without these two a server answers that with GOAWAY.
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Calls that wait for the event loop. Above its own limits (1,000 and 3,000) the library drops calls at random with
    # a bare CANCELLED, and so it does with calls that have waited for 30 s, as they do in a flood on a busy machine. A
    # flood must reach the queue, which refuses with a reason and a delay; who waits for less sets a deadline.
    ("grpc.server.max_pending_requests", 100_000),
    ("grpc.server.max_pending_requests_hard_limit", 200_000),
    ("grpc.server_max_unrequested_time_in_server", 3_600),
]
_CHANNEL: Final = [
    # Services are called directly: `http_proxy` of the environment would be asked even for loopback.
    ("grpc.enable_http_proxy", 0),
    # Channels of one program would share a connection otherwise, and so one of the processes behind an address.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # How long an attempt may take until the server has answered: for distant servers, and busy ones. Attempts that are
    # refused end at once, and the next one follows as the other two say.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]
# A port in use is an error, not a shared port.
SERVER_OPTIONS: Final = [*_limits(MAX_MESSAGE_BYTES), *_SERVER, ("grpc.so_reuseport", 0)]
# Several processes of one service listen on its port; the system gives each connection to one of them.
SHARED_PORT_OPTIONS: Final = [*_limits(MAX_MESSAGE_BYTES), *_SERVER, ("grpc.so_reuseport", 1)]
# Between processes of one service: one message may carry what several clients have sent.
PRIVATE_OPTIONS: Final = [*_limits(PRIVATE_MESSAGE_BYTES), *_SERVER]
CHANNEL_OPTIONS: Final = [*_limits(MAX_MESSAGE_BYTES), *_CHANNEL]


def open_channel(address: str) -> grpc.aio.Channel:
    """Returns a channel to `host:port`."""
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)


def open_private_channel(address: str) -> grpc.aio.Channel:
    """Returns a channel to unix:PATH, where another process of the same service listens."""
    return grpc.aio.insecure_channel(address, options=[*_limits(PRIVATE_MESSAGE_BYTES), *_CHANNEL])


class _Malformed:
    """Stands for a message that did not parse, until the handler's wrapper refuses it."""

    __slots__ = ()


_MALFORMED = _Malformed()


def _tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Returns a deserializer that yields `_MALFORMED` instead of raising."""

    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _MALFORMED

    return parse


def _checked(request: Any) -> Any:
    """Returns `request`; raises InvalidRequestError if it did not parse."""
    if request is _MALFORMED:
        message = "the message is not valid protobuf of this method's request type"
        raise InvalidRequestError(message, reason="MALFORMED_MESSAGE")
    return request


async def _checked_stream(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Yields `requests`; raises InvalidRequestError at one that did not parse."""
    async for request in requests:
        yield _checked(request)


async def _refuse(context: grpc.aio.ServicerContext[Any, Any], error: Exception, method: str) -> None:
    """Ends the call with the status of `error`."""
    if isinstance(error, asyncio.TimeoutError):
        error = DeadlineError("the deadline of the call passed")
    if not isinstance(error, QuireError):
        log.error("rpc_failed", rpc=method, exc_info=error)
        await context.abort(grpc.StatusCode.INTERNAL, "internal error; the server's log has the details")
    assert isinstance(error, QuireError)
    if error.code is grpc.StatusCode.INTERNAL:
        log.error("rpc_failed", rpc=method, reason=error.reason, exc_info=error)
    else:
        log.debug("rpc_refused", rpc=method, reason=error.reason, message=error.message)
    await context.abort_with_status(status.to_grpc(error))


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Maps exceptions to statuses, refuses malformed messages, and binds the request id to the log context."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Returns the method's handler, wrapped."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        method = str(handler_call_details.method)
        metadata = dict(handler_call_details.invocation_metadata or ())
        bound = {"request_id": metadata[REQUEST_ID_KEY]} if REQUEST_ID_KEY in metadata else {}
        wrapped: grpc.RpcMethodHandler[Any, Any] = _wrap(handler, method, bound)
        return wrapped


def _wrap(handler: Any, method: str, bound: dict[str, Any]) -> Any:
    """Returns `handler` with errors mapped and messages checked."""
    inner = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    checked = _checked_stream if handler.request_streaming else _checked

    async def write(request: Any, context: Any) -> None:
        # Left to gRPC, a generator whose call is cancelled while a message is being sent would only be dropped.
        async with contextlib.aclosing(inner(request, context)) as responses:
            async for response in responses:
                await context.write(response)

    answer = write if inspect.isasyncgenfunction(inner) else inner

    async def call(request: Any, context: Any) -> Any:
        structlog.contextvars.bind_contextvars(rpc=method, **bound)
        try:
            return await answer(checked(request), context)
        except (QuireError, TimeoutError) as error:
            await _refuse(context, error, method)
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 - the boundary: it is logged and becomes INTERNAL
            await _refuse(context, error, method)

    makers = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    maker = makers[handler.request_streaming, handler.response_streaming]
    return maker(
        call,
        request_deserializer=_tolerant(handler.request_deserializer),
        response_serializer=handler.response_serializer,
    )
