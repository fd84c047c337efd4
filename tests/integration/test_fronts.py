"""A gateway of several processes on one port: spread, equal, and mortal one by one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
import contextlib
import json
import os
from pathlib import Path
import signal
import time

import grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
import pytest

from quire.cli import main
from quire.client import AsyncClient, Client
from quire.errors import NotReadyError, QuireError
from quire.healthcheck import check
from tests.integration.stack import Service, Stack, running_stack, start_service
from tests.unit.execsvc import tiny

FRONTS = 2
FLAGS = ("--api-server-count", str(FRONTS))
EXECUTOR_FLAGS = ("--kv-cache-tokens", "16384", "--max-model-len", "1024")
GREEDY = {"temperature": 0.0, "ignore_eos": True}
STREAMS = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that takes no time: what is tested is around it."""
    return str(tiny.write_directory(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def fronts(tmp_path: Path, model: str) -> Iterator[Stack]:
    """A stack whose gateway is two fronts and an engine."""
    with running_stack(tmp_path, model=model, execsvc=EXECUTOR_FLAGS, gateway=FLAGS) as stack:
        wait_until(lambda: len(stack.gateway.events("service_ready")) > FRONTS)
        yield stack


def wait_until(condition: object, seconds: float = 30.0) -> None:
    """Waits until something holds."""
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def pid_of(gateway: Service, worker: str) -> int:
    """Returns the process id of the latest start of a worker."""
    started = [event["pid"] for event in gateway.events("worker_started") if event["worker"] == worker]
    return int(str(started[-1]))


def is_running(pid: int) -> bool:
    """Whether there is a process that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def prompt(number: int) -> str:
    """Returns a prompt of some length."""
    return f"{'the history of printing ' * (1 + number % 5)}number {number}:"


@contextlib.asynccontextmanager
async def connections(address: str, count: int = STREAMS):  # noqa: ANN201 - an async context manager of clients
    """Yields clients with a connection each."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(AsyncClient(address, timeout=90)) for _ in range(count)]


async def answers(clients: list[AsyncClient], max_tokens: int) -> list[str | QuireError]:
    """Returns what each client hears, all at once."""

    async def one(number: int, client: AsyncClient) -> str:
        result = await client.generate(prompt(number), max_tokens=max_tokens, **GREEDY)
        assert result.usage.completion_token_count == max_tokens
        return result.completions[0].text

    asked = [one(number, client) for number, client in enumerate(clients)]
    return await asyncio.gather(*asked, return_exceptions=True)  # type: ignore[return-value]


async def test_a_front_that_is_killed_takes_its_own_streams_alone(
    fronts: Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half the clients try again; the others see nothing, no block is lost, and there are two fronts again."""
    gateway = fronts.gateway
    doomed = pid_of(gateway, "front-0")
    async with connections(fronts.address) as clients:
        streaming = asyncio.create_task(answers(clients, 400))
        await asyncio.to_thread(wait_until, lambda: fronts.pool().used_token_count > 60 * STREAMS)
        os.kill(doomed, signal.SIGKILL)
        results = await streaming
    lost = [number for number, result in enumerate(results) if isinstance(result, BaseException)]
    assert 0 < len(lost) < STREAMS
    assert all(isinstance(results[number], NotReadyError) for number in lost)
    await asyncio.to_thread(fronts.wait_idle)
    assert main.run(["leaks", "--older-than", "0", "--json", "--memsvc", fronts.memsvc.address]) == 0
    assert json.loads(capsys.readouterr().out) == []
    await asyncio.to_thread(wait_until, lambda: pid_of(gateway, "front-0") != doomed)
    await asyncio.to_thread(wait_until, lambda: len(gateway.events("service_listening")) == FRONTS + 1)
    async with connections(fronts.address) as clients:
        again = await answers(clients, 400)
    assert [again[number] for number in range(STREAMS) if number not in lost] == [
        results[number] for number in range(STREAMS) if number not in lost
    ]
    assert not any(isinstance(result, BaseException) for result in again)
    await asyncio.to_thread(fronts.wait_idle)


async def test_32_of_32_texts_are_what_each_is_alone(fronts: Stack) -> None:
    """Which process a connection leads to must not change a character."""
    async with connections(fronts.address) as clients:
        together = await answers(clients, 60)
        await asyncio.to_thread(fronts.wait_idle)
        alone = []
        for number, client in enumerate(reversed(clients)):
            result = await client.generate(prompt(number), max_tokens=60, **GREEDY)
            alone.append(result.completions[0].text)
    assert together == alone
    await asyncio.to_thread(fronts.wait_idle)


async def test_an_engine_that_is_killed_is_an_error_with_a_delay_and_comes_back(fronts: Stack) -> None:
    """Clients that try again after the delay are served, by the fronts that they are connected to."""
    engine = pid_of(fronts.gateway, "engine")
    front_pids = {pid_of(fronts.gateway, f"front-{number}") for number in range(FRONTS)}
    async with connections(fronts.address, 8) as clients:
        streaming = asyncio.create_task(answers(clients, 800))
        await asyncio.to_thread(wait_until, lambda: fronts.pool().used_token_count > 60 * 8)
        os.kill(engine, signal.SIGKILL)
        for result in await streaming:
            assert isinstance(result, NotReadyError)
            assert (result.reason, result.retry_after) == ("ENGINE_UNAVAILABLE", 1.0)
        async with asyncio.timeout(30):
            for client in clients:
                while True:
                    try:
                        await client.generate("again", max_tokens=3, **GREEDY)
                    except NotReadyError as error:
                        await asyncio.sleep(error.retry_after or 30)
                    else:
                        break
    assert {pid_of(fronts.gateway, f"front-{number}") for number in range(FRONTS)} == front_pids
    # What the engine held before falls back after its lease has ended.
    await asyncio.to_thread(fronts.wait_idle, 10.0)


async def test_conversations_cancels_health_and_reflection_are_one_gateway(fronts: Stack) -> None:
    """A client cannot choose the process, so each must answer for all."""
    async with connections(fronts.address, 12) as clients:
        session = await clients[0].create_session("talk")
        spoken = 0
        for turn, client in enumerate(clients):
            stream = client.append(session.session_id, f"turn {turn} ", max_tokens=9, **GREEDY)
            result = await stream.result()
            assert result.usage.cached_token_count >= spoken - 8
            spoken = result.usage.prompt_token_count + 9
        seen = [await client.list_sessions() for client in clients]
        assert all([(one.session_id, one.turn_count) for one in page] == [("talk", len(clients))] for page in seen)
        streams = [client.stream("x", request_id=f"r{n}", max_tokens=900, **GREEDY) for n, client in enumerate(clients)]
        for stream in streams:
            await anext(aiter(stream))
        names = tuple(f"r{number}" for number in range(len(clients)))
        found = await clients[0].cancel(*names, "nobody")
        assert (found.cancelled, found.unknown) == (names, ("nobody",))
        await asyncio.to_thread(fronts.wait_idle)

    def look() -> None:
        for _ in range(8):
            assert check(fronts.address) == "SERVING"
            with grpc.insecure_channel(fronts.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
                names = set(ProtoReflectionDescriptorDatabase(channel).get_services())
            assert {"quire.gateway.v1.GenerationService", "quire.gateway.v1.SessionService"} <= names
            assert "quire.gateway.v1.EngineService" not in names

    await asyncio.to_thread(look)


def test_a_drain_finishes_what_runs_on_every_front(fronts: Stack) -> None:
    """SIGTERM must let answers end, whichever process streams them, and end with 0."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(fronts.address, timeout=60)) for _ in range(8)]
        streams = [client.stream(prompt(0), max_tokens=600, **GREEDY) for client in clients]
        for stream in streams:
            next(iter(stream))
        fronts.gateway.process.terminate()
        assert [stream.result().usage.completion_token_count for stream in streams] == [600] * 8
    assert fronts.gateway.process.wait(20) == 0
    assert len(fronts.gateway.events("service_stopped")) == FRONTS + 1
    fronts.wait_idle()


def test_a_supervisor_that_is_killed_leaves_no_process(fronts: Stack) -> None:
    """A process that nobody knows of would keep the port."""
    names = ("engine", *(f"front-{number}" for number in range(FRONTS)))
    pids = [pid_of(fronts.gateway, name) for name in names]
    (engine,) = fronts.gateway.events("private_service_listening")
    directory = Path(str(engine["address"]).removeprefix("unix:")).parent
    assert directory.is_dir()
    fronts.gateway.process.kill()
    fronts.gateway.process.wait()
    wait_until(lambda: not any(is_running(pid) for pid in pids))
    assert not directory.exists()


def test_a_port_in_use_is_an_error(fronts: Stack, tmp_path: Path) -> None:
    """Two gateways that share a port by accident would each answer half of the clients."""
    port = fronts.address.rpartition(":")[2]
    for flags in ((), FLAGS):
        second = start_service("gateway", tmp_path, *flags, port=port)
        assert second.process.wait(30) == 1
        last = second.log_path.read_text().splitlines()[-1]
        assert last.startswith(f"quire gateway: cannot listen on 127.0.0.1:{port}: ")


def test_one_machine_may_have_several_fronts_too(tmp_path: Path, model: str) -> None:
    """With memory and executor inside, the process that computes has no clients to serve."""
    settings = {
        "QUIRE_EXECSVC_MODEL": model,
        "QUIRE_EXECSVC_KV_CACHE_TOKENS": "2048",
        "QUIRE_EXECSVC_MAX_MODEL_LEN": "1024",
    }
    alone = start_service("gateway", tmp_path, "--in-process", *FLAGS, settings=settings)
    try:
        alone.wait_listening()
        alone.wait_serving()
        with Client(alone.address) as client:
            assert client.generate("hello", max_tokens=8, **GREEDY).usage.completion_token_count == 8
    finally:
        code = alone.stop()
    assert code == 0
    assert len(alone.events("request_finished")) == 1
