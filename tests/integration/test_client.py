"""The clients against a server on loopback that does what the public contract says, and fails as it may."""

import asyncio
from collections.abc import AsyncIterator, Iterator
import gc
import socket
import threading
import time

import grpc
import pytest

from protos.gateway.v1 import gateway_pb2, gateway_pb2_grpc
from quire import AsyncClient, Client, errors
from quire.generation import Delta, FinishReason
from quire.rpc import SERVER_OPTIONS, ErrorInterceptor


class ScriptedGateway(gateway_pb2_grpc.GenerationServiceServicer):
    """Answers by the prompt: "refuse", "slow", "lose", anything else is echoed word by word."""

    def __init__(self) -> None:
        """Starts with nothing seen."""
        self.ended = threading.Event()
        self.abort_process = asyncio.Event()

    async def GenerateStream(self, request, context):  # type: ignore[no-untyped-def,override]  # noqa: ANN001, ANN201, D102, N802
        spec = request.spec
        if spec.text == "refuse":
            raise errors.PromptTooLongError("9 tokens, at most 5", field="text", metadata={"limit": 5})
        try:
            admitted = gateway_pb2.GenerateStreamResponse()
            admitted.admitted.request_id = spec.request_id
            yield admitted
            words = spec.text.split() or [turn.content for turn in spec.chat.messages]
            for index, word in enumerate(words):
                delta = gateway_pb2.GenerateStreamResponse()
                sample = delta.delta.samples.add(index=0, text=word + " ", token_ids=[index])
                if index == len(words) - 1 and word != "slow":
                    sample.ending.reason = gateway_pb2.FINISH_REASON_EOS
                yield delta
            while words[-1] == "slow":
                await asyncio.sleep(0.01)
                yield delta
            finished = gateway_pb2.GenerateStreamResponse()
            finished.finished.usage.completion_token_count = len(words)
            yield finished
        finally:
            self.ended.set()

    async def Generate(self, request, context):  # type: ignore[no-untyped-def,override]  # noqa: ANN001, ANN201, D102, N802
        if request.spec.text == "slow":
            await asyncio.sleep(30)
        answer = gateway_pb2.GenerateResponse(request_id=request.spec.request_id)
        answer.completions.add(
            index=0, text=request.spec.text, token_ids=[1]
        ).ending.reason = gateway_pb2.FINISH_REASON_LENGTH
        return answer

    async def CountTokens(self, request, context):  # type: ignore[no-untyped-def,override]  # noqa: ANN001, ANN201, D102, N802
        return gateway_pb2.CountTokensResponse(token_count=2, token_ids=[5, 6])

    async def ListModels(self, request, context):  # type: ignore[no-untyped-def,override]  # noqa: ANN001, ANN201, D102, N802
        return gateway_pb2.ListModelsResponse(models=[gateway_pb2.Model(name="m", executor_ids=["e"])])

    async def CancelRequests(self, request, context):  # type: ignore[no-untyped-def,override]  # noqa: ANN001, ANN201, D102, N802
        return gateway_pb2.CancelRequestsResponse(unknown_request_ids=request.request_ids)


class Server:
    """A scripted gateway in a thread of its own, so that a plain program can be tested as one."""

    def __init__(self) -> None:
        """Starts it."""
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self.gateway = ScriptedGateway()
        self.address = asyncio.run_coroutine_threadsafe(self._start(), self.loop).result(10)

    async def _start(self) -> str:
        self._server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=[ErrorInterceptor()])
        gateway_pb2_grpc.add_GenerationServiceServicer_to_server(self.gateway, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return f"127.0.0.1:{port}"

    def vanish(self) -> None:
        """Closes every connection at once."""
        asyncio.run_coroutine_threadsafe(self._server.stop(None), self.loop).result(10)

    def close(self) -> None:
        """Stops the server and its thread."""
        self.vanish()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


@pytest.fixture
def server() -> Iterator[Server]:
    """A running server."""
    running = Server()
    yield running
    running.close()


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    """A client of it."""
    with Client(server.address, timeout=10) as opened:
        yield opened


@pytest.fixture
async def async_client(server: Server) -> AsyncIterator[AsyncClient]:
    """The same for asyncio."""
    async with AsyncClient(server.address, timeout=10) as opened:
        yield opened


def test_a_stream_yields_text_and_then_the_whole(client: Client) -> None:
    """The ten lines of the README."""
    stream = client.stream("one two three")
    assert list(stream.text()) == ["one ", "two ", "three "]
    whole = stream.result()
    assert (whole.text, whole.token_ids, whole.finish_reason) == ("one two three ", (0, 1, 2), FinishReason.EOS)
    assert whole.request_id == stream.request_id
    assert stream.usage is not None and stream.usage.completion_token_count == 3


async def test_an_async_stream_does_the_same(async_client: AsyncClient) -> None:
    """Both clients must behave alike."""
    stream = async_client.stream_chat([{"role": "user", "content": "hello"}])
    deltas = [event async for event in stream if isinstance(event, Delta)]
    assert [delta.text for delta in deltas] == ["hello "]
    assert (await stream.result()).text == "hello "


def test_unary_calls_answer_with_dataclasses(client: Client) -> None:
    """A user never meets protobuf."""
    assert client.generate("whole").text == "whole"
    assert client.chat([{"role": "user", "content": "x"}]).finish_reason is FinishReason.LENGTH
    assert client.count_tokens("ab").token_ids == (5, 6)
    assert client.models()[0].executor_ids == ("e",)
    assert client.cancel("r1", "r2").unknown == ("r1", "r2")


async def test_unary_calls_answer_with_dataclasses_in_asyncio_too(async_client: AsyncClient) -> None:
    """Both clients must behave alike."""
    assert (await async_client.generate("whole")).text == "whole"
    assert (await async_client.chat([{"role": "user", "content": "x"}])).finish_reason is FinishReason.LENGTH
    assert (await async_client.count_tokens("ab")).token_count == 2
    assert (await async_client.models())[0].name == "m"
    assert (await async_client.cancel("r1")).unknown == ("r1",)


def test_the_servers_error_is_what_is_raised(client: Client) -> None:
    """A program must be able to tell a prompt that is too long from a server that is down."""
    with pytest.raises(errors.PromptTooLongError, match="9 tokens, at most 5") as caught:
        list(client.stream("refuse"))
    assert (caught.value.field, caught.value.metadata) == ("text", {"limit": "5"})


async def test_the_servers_error_is_what_is_raised_in_asyncio_too(async_client: AsyncClient) -> None:
    """Both clients must behave alike."""
    with pytest.raises(errors.PromptTooLongError):
        await async_client.stream("refuse").result()


def test_no_server_is_one_clear_error() -> None:
    """The text of grpc itself is three lines of addresses and timestamps."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with Client(address) as client:
            with pytest.raises(errors.NotReadyError) as caught:
                client.generate("x")
            with pytest.raises(errors.NotReadyError):
                client.stream("x").result()
    assert (caught.value.message, caught.value.reason) == (f"nothing answers at {address}", "UNREACHABLE")


def test_a_server_that_vanishes_is_a_lost_connection(client: Client, server: Server) -> None:
    """Half an answer must never look like a whole one."""
    stream = client.stream("slow")
    next(stream)
    next(stream)
    server.vanish()
    with pytest.raises(errors.QuireError) as caught:
        stream.result()
    assert caught.value.reason in {"CONNECTION_LOST", "CANCELLED"}


def test_the_deadline_ends_a_call(client: Client) -> None:
    """A call without an end hangs its program."""
    with pytest.raises(errors.DeadlineError):
        client.generate("slow", timeout=0.2)
    with pytest.raises(errors.DeadlineError):
        client.stream("slow", timeout=0.2).result()


def test_a_closed_stream_is_cancelled_at_the_server(client: Client, server: Server) -> None:
    """Otherwise its blocks stay taken until it has generated all it may."""
    with client.stream("slow") as stream:
        next(stream)
    assert server.gateway.ended.wait(5)
    assert all(isinstance(event, Delta) for event in stream)
    with pytest.raises(errors.RequestCancelledError, match="closed before it finished"):
        stream.result()


def test_an_abandoned_stream_is_cancelled_at_the_server(client: Client, server: Server) -> None:
    """`break` in a loop is how most streams end early; nobody closes them."""
    for event in client.stream("slow"):
        if isinstance(event, Delta):
            break
    del event
    gc.collect()
    assert server.gateway.ended.wait(5)


async def test_an_abandoned_async_stream_is_cancelled_at_the_server(async_client: AsyncClient, server: Server) -> None:
    """The same for asyncio."""
    async for event in async_client.stream("slow"):
        if isinstance(event, Delta):
            break
    gc.collect()
    assert await asyncio.to_thread(server.gateway.ended.wait, 5)


async def test_cancelling_the_task_cancels_at_the_server(async_client: AsyncClient, server: Server) -> None:
    """Programs on asyncio end things by cancelling tasks."""

    async def consume() -> None:
        async with async_client.stream("slow") as stream:
            await stream.result()

    task = asyncio.create_task(consume())
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(server.gateway.ended.wait, 5)


def test_a_plain_client_works_from_several_threads(client: Client) -> None:
    """Web servers with threads share one client."""
    answers: list[str] = []
    threads = [
        threading.Thread(target=lambda n=n: answers.append(client.stream(f"word {n}").result().text)) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(answers) == [f"word {n} " for n in range(8)]


async def test_a_plain_client_works_beside_a_running_event_loop(server: Server) -> None:
    """In a notebook a loop is always running."""
    with Client(server.address, timeout=10) as client:
        begun = time.monotonic()
        assert client.generate("x").text == "x"
        assert time.monotonic() - begun < 5
