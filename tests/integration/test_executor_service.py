"""The executor over gRPC: its RPCs, its registration, and how its streams end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
import contextlib
import dataclasses
import hashlib
from pathlib import Path

from google.protobuf import duration_pb2
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
import pytest
import pytest_asyncio

from execsvc.config import ExecsvcConfig
from execsvc.executor import Executor
from execsvc.server import Server
from execsvc.service import ExecutorServicer
from protos.execsvc.v1 import execsvc_pb2 as pb
from protos.execsvc.v1 import execsvc_pb2_grpc
from protos.memsvc.v1 import memsvc_pb2, memsvc_pb2_grpc
from quire import columns
from quire.cli.progress import TerminalReporter
from quire.errors import ModelFormatError, NotReadyError, StaleEpochError
from quire.rpc import open_channel
from quire.serve.readiness import Probe
from tests.unit.execsvc import tiny
from tests.unit.execsvc.tiny import start

DEADLINE = 20.0
PROMPT = list(range(20))


class Registry(memsvc_pb2_grpc.MemoryServiceServicer):
    """Only what an executor calls of memsvc, so that a test can decide what is answered."""

    def __init__(self) -> None:
        self.epoch = 3
        self.heartbeat_error: grpc.StatusCode | None = None
        self.registrations: list[memsvc_pb2.RegisterPoolRequest] = []

    async def RegisterPool(  # noqa: N802
        self, request: memsvc_pb2.RegisterPoolRequest, context: object
    ) -> memsvc_pb2.RegisterPoolResponse:
        """Grants the epoch."""
        self.registrations.append(request)
        self.heartbeat_error = None
        return memsvc_pb2.RegisterPoolResponse(
            pool_id=request.executor_id, epoch=self.epoch, heartbeat_interval=duration_pb2.Duration(nanos=50_000_000)
        )

    async def Heartbeat(  # noqa: N802
        self, request: memsvc_pb2.HeartbeatRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> memsvc_pb2.HeartbeatResponse:
        """Answers, or fails as told."""
        if self.heartbeat_error is not None:
            await context.abort(self.heartbeat_error, "as told")
        return memsvc_pb2.HeartbeatResponse(epoch=self.epoch)


@dataclasses.dataclass
class Running:
    """A running executor and what it is registered with."""

    registry: Registry
    server: Server
    task: asyncio.Task[None]
    stub: execsvc_pb2_grpc.ExecutorServiceAsyncStub
    health: health_pb2_grpc.HealthStub

    async def serving(self) -> bool:
        """Whether its health is SERVING."""
        answer = await self.health.Check(health_pb2.HealthCheckRequest(service="quire.execsvc.v1.ExecutorService"))
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def until_serving(self) -> pb.DescribeResponse:
        """Waits until it serves; returns its description."""
        async with asyncio.timeout(DEADLINE):
            while not await self.serving():
                await asyncio.sleep(0.02)
        return await self.stub.Describe(pb.DescribeRequest())

    def open(self, description: pb.DescribeResponse, gateway: int = 7) -> pb.RunRequest:
        """Returns the first message of a stream."""
        incarnation = description.executor_incarnation
        return pb.RunRequest(
            open=pb.Open(
                gateway_id="gw", gateway_incarnation=gateway, executor_incarnation=incarnation, epoch=description.epoch
            )
        )


@contextlib.asynccontextmanager
async def running(directory: Path, *, memsvc_starts_late: bool = False) -> AsyncIterator[Running]:
    """Yields an executor of a tiny model and a registry; both are gone afterwards."""
    registry = Registry()
    memsvc = grpc.aio.server()
    memsvc_pb2_grpc.add_MemoryServiceServicer_to_server(registry, memsvc)
    port = memsvc.add_insecure_port("127.0.0.1:0")
    config = ExecsvcConfig(
        port=0, model=str(tiny.write_directory(directory)), memsvc=f"127.0.0.1:{port}", kv_cache_tokens=2048,
        drain_grace=0.5, num_threads=1,
    )  # fmt: skip
    if not memsvc_starts_late:
        await memsvc.start()
    server = Server(config)
    task = asyncio.create_task(server.run())
    async with asyncio.timeout(DEADLINE):
        while not server._host.address:
            await asyncio.sleep(0.01)
    async with open_channel(server._host.address) as channel:
        stub = execsvc_pb2_grpc.ExecutorServiceStub(channel)
        found = Running(registry, server, task, stub, health_pb2_grpc.HealthStub(channel))
        if memsvc_starts_late:
            async with asyncio.timeout(DEADLINE):
                while not (await stub.Describe(pb.DescribeRequest())).HasField("model"):
                    await asyncio.sleep(0.02)
            assert not await found.serving()
            await memsvc.start()
        try:
            yield found
        finally:
            server._host.request_stop("test is over")
            async with asyncio.timeout(DEADLINE):
                await asyncio.gather(task, return_exceptions=True)
            await memsvc.stop(None)


@pytest_asyncio.fixture
async def executor(tmp_path: Path) -> AsyncIterator[Running]:
    """A running executor."""
    async with running(tmp_path) as found:
        yield found


def plan(step: int, epoch: int, count: int, **fields: object) -> pb.RunRequest:
    """Returns a plan that computes `count` tokens of table 1."""
    scheduled = {"scheduled_tables": columns.pack([1]), "scheduled_counts": columns.pack([count])} if count else {}
    return pb.RunRequest(plan=pb.StepPlan(step=step, epoch=epoch, **scheduled, **fields))  # type: ignore[arg-type]


async def result(call: grpc.aio.StreamStreamCall[pb.RunRequest, pb.RunResponse]) -> pb.StepResult:
    """Returns the next result."""
    response = await asyncio.wait_for(call.read(), DEADLINE)
    assert isinstance(response, pb.RunResponse), "the stream ended"
    return response.result


async def test_a_gateway_gets_a_tokenizer_and_tokens(executor: Running) -> None:
    """Otherwise nothing works."""
    description = await executor.until_serving()
    assert description.ready
    assert description.model.name
    assert description.pool.block_count == 2048 // 16 + 1
    assert executor.registry.registrations[0].spec == description.pool
    parts = [part async for part in executor.stub.GetTokenizer(pb.GetTokenizerRequest())]
    assert hashlib.sha256(b"".join(part.chunk for part in parts)).digest() == parts[0].sha256
    call = executor.stub.Run()
    await call.write(executor.open(description))
    await call.write(plan(1, 3, 20, added=[start(1, PROMPT, [1, 2])]))
    # Two steps ahead: nobody waits for the token of the step before.
    await call.write(plan(2, 3, 1))
    await call.write(plan(3, 3, 0, removed=columns.pack([1])))
    opened = await call.read()
    assert isinstance(opened, pb.RunResponse)
    assert opened.opened.epoch == 3
    results = [await result(call) for _ in range(3)]
    assert [found.step for found in results] == [1, 2, 3]
    assert results[0].sampled_tokens
    assert results[1].sampled_tokens
    assert columns.unpack_list(results[2].fenced, "") == [1]
    await call.done_writing()
    assert await call.code() == grpc.StatusCode.OK


async def test_it_waits_for_memsvc_and_says_so_by_its_health(tmp_path: Path) -> None:
    """Otherwise the order in which services start would matter."""
    async with running(tmp_path, memsvc_starts_late=True) as executor:
        assert (await executor.until_serving()).epoch == 3


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"executor_incarnation": 1}, grpc.StatusCode.ABORTED),
        ({"epoch": 2}, grpc.StatusCode.ABORTED),
    ],
)
async def test_a_stale_gateway_is_turned_away(
    executor: Running, changes: dict[str, int], code: grpc.StatusCode
) -> None:
    """Otherwise a gateway would write into blocks that it no longer holds."""
    first = executor.open(await executor.until_serving())
    for field, value in changes.items():
        setattr(first.open, field, value)
    call = executor.stub.Run()
    await call.write(first)
    assert await asyncio.wait_for(call.code(), DEADLINE) == code


@pytest.mark.parametrize(
    ("second", "code"),
    [
        (plan(2, 3, 0), grpc.StatusCode.ABORTED),
        (plan(1, 2, 0), grpc.StatusCode.ABORTED),
        (plan(1, 3, 0, removed=b"abc"), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.RunRequest(open=pb.Open()), grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_a_wrong_plan_ends_its_stream_only(
    executor: Running, second: pb.RunRequest, code: grpc.StatusCode
) -> None:
    """Otherwise one gateway's defect would stop all."""
    description = await executor.until_serving()
    bystander, call = executor.stub.Run(), executor.stub.Run()
    await bystander.write(executor.open(description, gateway=8))
    await bystander.read()
    await call.write(executor.open(description))
    await call.read()
    await call.write(second)
    assert await asyncio.wait_for(call.code(), DEADLINE) == code
    await bystander.write(plan(1, 3, 20, added=[start(1, PROMPT, [1, 2])]))
    assert (await result(bystander)).sampled_tokens
    bystander.cancel()


async def test_a_fence_ends_the_streams_of_a_gateway_and_keeps_it_out(executor: Running) -> None:
    """Otherwise memsvc could never free the blocks of a gateway that does not answer."""
    description = await executor.until_serving()
    fenced, other = executor.stub.Run(), executor.stub.Run()
    for call, gateway, table in ((fenced, 7, 1), (other, 8, 2)):
        await call.write(executor.open(description, gateway=gateway))
        await call.read()
        await call.write(plan(1, 3, 0, added=[start(table, PROMPT, [table])]))
        await result(call)
    answer = await executor.stub.Fence(pb.FenceRequest(gateway_incarnations=[7]))
    assert columns.unpack_list(answer.open_tables, "") == [2]
    assert await asyncio.wait_for(fenced.code(), DEADLINE) == grpc.StatusCode.ABORTED
    again = executor.stub.Run()
    await again.write(executor.open(description, gateway=7))
    assert await asyncio.wait_for(again.code(), DEADLINE) == grpc.StatusCode.ABORTED
    other.cancel()


async def test_a_dead_gateway_s_tables_are_dropped(executor: Running) -> None:
    """Otherwise rows of the executor would leak with every crash of a gateway."""
    description = await executor.until_serving()
    call = executor.stub.Run()
    await call.write(executor.open(description))
    await call.read()
    await call.write(plan(1, 3, 20, added=[start(1, PROMPT, [1, 2])]))
    await result(call)
    assert await executor.server.executor.open_tables() == [1]
    call.cancel()
    async with asyncio.timeout(DEADLINE):
        while await executor.server.executor.open_tables():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("pause", range(12))
async def test_a_call_that_is_cancelled_while_it_ends_drops_its_tables(executor: Running, pause: int) -> None:
    """A gateway that dies ends its stream first, and then the call: the second must not undo what the first began."""
    description = await executor.until_serving()
    gone = asyncio.Event()

    async def requests() -> AsyncIterator[pb.RunRequest]:
        yield executor.open(description)
        yield plan(1, 3, 20, added=[start(1, PROMPT, [1, 2])])
        await gone.wait()

    async def answer() -> None:
        run = ExecutorServicer(executor.server.executor).Run(requests(), None)  # type: ignore[arg-type]
        async with contextlib.aclosing(run) as responses:
            async for _ in responses:
                pass

    call = asyncio.create_task(answer())
    async with asyncio.timeout(DEADLINE):
        while not await executor.server.executor.open_tables():
            await asyncio.sleep(0.01)
        gone.set()
        for _ in range(pause):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        while await executor.server.executor.open_tables():
            await asyncio.sleep(0.01)


async def test_a_restarted_memsvc_begins_a_new_epoch(executor: Running) -> None:
    """Otherwise grants of a memsvc that forgot them would go on being used."""
    description = await executor.until_serving()
    call = executor.stub.Run()
    await call.write(executor.open(description))
    await call.read()
    executor.registry.epoch = 4
    executor.registry.heartbeat_error = grpc.StatusCode.NOT_FOUND
    assert await asyncio.wait_for(call.code(), DEADLINE) == grpc.StatusCode.ABORTED
    assert (await executor.stub.Describe(pb.DescribeRequest())).epoch == 4
    assert executor.registry.registrations[-1].epoch_floor == 3


async def test_a_replaced_incarnation_exits_with_an_error(executor: Running) -> None:
    """Otherwise two executors would write to what memsvc believes is one pool."""
    await executor.until_serving()
    executor.registry.heartbeat_error = grpc.StatusCode.ABORTED
    with pytest.raises(StaleEpochError, match="newer incarnation"):
        await asyncio.wait_for(executor.task, DEADLINE)


async def test_how_far_loading_is_is_told_to_whoever_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`quire serve` would seem to hang on a large model, and a quick one is loaded before anybody can ask."""
    executor = Executor(ExecsvcConfig(model=str(tmp_path)), lambda _: None)
    executor.load_progress = 0.44
    server = grpc.aio.server()
    execsvc_pb2_grpc.add_ExecutorServiceServicer_to_server(ExecutorServicer(executor), server)
    waiting = health_aio.HealthServicer()
    await waiting.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(waiting, server)
    probe = Probe("execsvc", f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    await server.start()
    try:
        progress = await asyncio.wait_for(probe.ask(), DEADLINE)
        TerminalReporter(verbose=False).progress("execsvc", progress)
        assert "execsvc: loading weights 44%\n" in capsys.readouterr().err
    finally:
        await probe.close()
        await server.stop(None)
        await executor.close()


async def test_calls_are_refused_while_loading(tmp_path: Path) -> None:
    """Otherwise a gateway would hang on an executor that is not there yet."""
    executor = Executor(ExecsvcConfig(model=str(tmp_path)), lambda _: None)
    try:
        assert not executor.describe().ready
        with pytest.raises(NotReadyError, match="loading"):
            executor.tokenizer()
        with pytest.raises(NotReadyError, match="loading"):
            executor.open_stream(pb.Open())
    finally:
        await executor.close()


async def test_a_model_that_cannot_be_loaded_ends_the_process(tmp_path: Path) -> None:
    """Otherwise a mistyped path would leave a service that never serves."""
    server = Server(ExecsvcConfig(port=0, model=str(tmp_path)))
    with pytest.raises(ModelFormatError, match=r"config.json is missing"):
        await asyncio.wait_for(server.run(), DEADLINE)
