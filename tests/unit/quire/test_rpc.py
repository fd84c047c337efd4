"""Servers refuse malformed messages and map errors, seen over a real loopback connection."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
import contextlib
import gc

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import HealthServicer
import pytest

from protos.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from quire import status
from quire.errors import AdmissionError, QuireError
from quire.healthcheck import check
from quire.rpc import CHANNEL_OPTIONS, SERVER_OPTIONS, ErrorInterceptor, open_channel

SERVICE = "/quire.gateway.v1.GenerationService/"


class Gateway(gateway_pb2_grpc.GenerationServiceServicer):
    """Fails in every way that a handler can."""

    async def ListModels(self, request, context):  # type: ignore[no-untyped-def,override]  # noqa: ANN001, ANN201, D102, N802
        raise ValueError("the inner text of a defect")

    async def CountTokens(self, request, context):  # type: ignore[no-untyped-def,override]  # noqa: ANN001, ANN201, D102, N802
        return gateway_pb2.CountTokensResponse(token_count=len(request.text))

    async def GenerateStream(self, request, context):  # type: ignore[no-untyped-def,override]  # noqa: ANN001, ANN201, D102, N802
        yield gateway_pb2.GenerateStreamResponse(admitted=gateway_pb2.Admitted(request_id="one"))
        raise AdmissionError("the queue is full", retry_after=2.0)

    async def Generate(self, request, context):  # type: ignore[no-untyped-def,override]  # noqa: ANN001, ANN201, D102, N802
        raise TimeoutError

    async def CancelRequests(self, request, context):  # type: ignore[no-untyped-def,override]  # noqa: ANN001, ANN201, D102, N802
        return gateway_pb2.CancelRequestsResponse()


class Endless(Gateway):
    """Yields until it is closed."""

    def __init__(self) -> None:
        self.yielded = 0
        self.closed = asyncio.Event()

    async def GenerateStream(self, request, context):  # type: ignore[no-untyped-def,override]  # noqa: ANN001, ANN201, D102, N802
        delta = gateway_pb2.Delta(samples=[gateway_pb2.SampleDelta(text="a" * 2**20)])
        try:
            while True:
                self.yielded += 1
                yield gateway_pb2.GenerateStreamResponse(delta=delta)
        finally:
            self.closed.set()


@contextlib.asynccontextmanager
async def listening(servicer: Gateway) -> AsyncIterator[str]:
    """The address of a real server with our options and interceptor."""
    server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=[ErrorInterceptor()])
    gateway_pb2_grpc.add_GenerationServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


@contextlib.asynccontextmanager
async def served(servicer: Gateway) -> AsyncIterator[grpc.aio.Channel]:
    """A connection to such a server."""
    async with listening(servicer) as address, open_channel(address) as opened:
        yield opened


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    """A connection to a server that fails."""
    async with served(Gateway()) as opened:  # type: ignore[abstract]
        yield opened


async def failure_of(call: object) -> QuireError:
    """Returns the error of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call  # type: ignore[misc]
    return status.from_rpc_error(caught.value)


async def test_a_malformed_message_is_the_callers_fault(channel: grpc.aio.Channel) -> None:
    """Left alone, grpcio answers UNKNOWN with Python text, which sends people looking in the wrong place."""
    error = await failure_of(channel.unary_unary(SERVICE + "CountTokens")(b"\xff\xff\xff"))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.reason == "MALFORMED_MESSAGE"


async def test_a_malformed_message_on_a_stream_is_the_callers_fault(channel: grpc.aio.Channel) -> None:
    """The same must hold for methods that answer with a stream."""
    call = channel.unary_stream(SERVICE + "GenerateStream")(b"\xff\xff\xff")
    error = await failure_of(call.read())
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_good_message_still_passes(channel: grpc.aio.Channel) -> None:
    """The check must not cost the good ones."""
    request = gateway_pb2.CountTokensRequest(text="abc")
    raw = await channel.unary_unary(SERVICE + "CountTokens")(request.SerializeToString())
    assert gateway_pb2.CountTokensResponse.FromString(raw).token_count == 3


async def test_an_oversized_message_is_refused(channel: grpc.aio.Channel) -> None:
    """One caller must not fill the server's memory."""
    raw = gateway_pb2.CountTokensRequest(text="a" * (17 * 2**20)).SerializeToString()
    error = await failure_of(channel.unary_unary(SERVICE + "CountTokens")(raw))
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_defect_tells_the_caller_nothing_of_the_inside(channel: grpc.aio.Channel) -> None:
    """Inner text may hold what another user wrote."""
    stub = gateway_pb2_grpc.GenerationServiceStub(channel)
    error = await failure_of(stub.ListModels(gateway_pb2.ListModelsRequest()))
    assert error.code is grpc.StatusCode.INTERNAL
    assert "inner text" not in error.message


async def test_a_timeout_inside_is_a_deadline(channel: grpc.aio.Channel) -> None:
    """A caller retries a deadline otherwise than a defect."""
    stub = gateway_pb2_grpc.GenerationServiceStub(channel)
    error = await failure_of(stub.Generate(gateway_pb2.GenerateRequest()))
    assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_an_error_after_the_first_message_keeps_its_details(channel: grpc.aio.Channel) -> None:
    """A stream that fails midway must still say why, and when to try again."""
    stub = gateway_pb2_grpc.GenerationServiceStub(channel)
    call = stub.GenerateStream(gateway_pb2.GenerateStreamRequest())
    first = await call.read()
    assert first.admitted.request_id == "one"  # type: ignore[union-attr]
    error = await failure_of(call.read())
    assert (error.reason, error.retry_after) == ("QUEUE_FULL", 2.0)


async def test_a_stream_that_is_cancelled_while_it_sends_is_closed() -> None:
    """What a handler holds, a table or a lease, must not wait for the garbage collector when its client is gone."""
    endless = Endless()  # type: ignore[abstract]
    gc.disable()
    try:
        async with served(endless) as channel:
            stub = gateway_pb2_grpc.GenerationServiceStub(channel)
            call = stub.GenerateStream(gateway_pb2.GenerateStreamRequest())
            await call.read()
            before = -1
            # Nobody reads: sooner or later a message cannot leave.
            while endless.yielded > before:
                before = endless.yielded
                await asyncio.sleep(0.3)
            call.cancel()
            await asyncio.wait_for(endless.closed.wait(), 20)
    finally:
        gc.enable()


@contextlib.asynccontextmanager
async def distant(servicer: Gateway, seconds: float) -> AsyncIterator[str]:
    """The address of a relay that takes its time to connect to a server."""
    pipes: list[asyncio.Task[None]] = []

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            writer.write(data)
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(seconds)
        far_reader, far_writer = await asyncio.open_connection(*near.rsplit(":", 1))
        pipes.extend(map(asyncio.create_task, (pipe(reader, far_writer), pipe(far_reader, writer))))

    async with listening(servicer) as near:
        async with await asyncio.start_server(connected, "127.0.0.1", 0) as relay:
            yield f"127.0.0.1:{relay.sockets[0].getsockname()[1]}"
        await asyncio.gather(*pipes)


async def test_a_server_may_take_its_time_to_connect() -> None:
    """Who is a continent away, or calls a busy machine, would hear that nothing answers."""
    async with distant(Gateway(), 0.4) as address, open_channel(address) as opened:  # type: ignore[abstract]
        request = gateway_pb2.CountTokensRequest(text="abc")
        answer = await gateway_pb2_grpc.GenerationServiceStub(opened).CountTokens(request, timeout=20)
    assert answer.token_count == 3


async def test_an_unknown_method_is_unimplemented(channel: grpc.aio.Channel) -> None:
    """A client of another version learns that the method is not there."""
    error = await failure_of(channel.unary_unary(SERVICE + "NoSuchMethod")(b""))
    assert error.code is grpc.StatusCode.UNIMPLEMENTED


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Company machines set http_proxy; a service on loopback would then look as if it were down."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("grpc_proxy", "http://127.0.0.1:9")
    server = grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        assert check(address) == "SERVING"
        with grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            assert stub.Check(health_pb2.HealthCheckRequest(), timeout=5).status == 1
    finally:
        server.stop(None).wait(5)
