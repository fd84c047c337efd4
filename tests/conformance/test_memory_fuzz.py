"""Structured garbage at every RPC of the memory service: a clear status, and nothing changed."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import grpc
import pytest

from protos.memsvc.v1 import admin_pb2, admin_pb2_grpc, memsvc_pb2, memsvc_pb2_grpc
from quire.rpc import open_channel
from tests.conformance.memory_connections import POOL_ID, StreamConnection, pack, prompt, spec
from tests.conformance.memory_rig import Rig, grpc_rig

EXPECTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.ABORTED,
}
NUMBERS = [0, 1, 2, 3, 15, 16, 17, 31, 32, 33, 2**31 - 1, 2**31, 2**32 - 1]
TEXTS = ["", "a", POOL_ID, "\0", "é" * 300, "x" * 5000, "../..", "r/0"]


def column(random_source: random.Random) -> bytes:
    """Returns packed numbers, sometimes cut."""
    values = [random_source.choice(NUMBERS) for _ in range(random_source.randrange(4))]
    data = pack(values)
    return data[: random_source.randrange(len(data) + 1)] if random_source.random() < 0.2 else data


def filled(message: Any, random_source: random.Random) -> Any:
    """Returns `message` with every field drawn at random."""
    for field in message.DESCRIPTOR.fields:
        if random_source.random() < 0.25:
            continue
        if field.message_type is not None:
            if field.containing_oneof is None:
                filled(getattr(message, field.name), random_source)
            continue
        kinds: dict[int, Any] = {
            field.TYPE_STRING: lambda: random_source.choice(TEXTS),
            field.TYPE_BYTES: lambda: column(random_source),
            field.TYPE_BOOL: lambda: random_source.random() < 0.5,
            field.TYPE_UINT32: lambda: random_source.choice(NUMBERS),
            field.TYPE_UINT64: lambda: random_source.choice([*NUMBERS, 2**64 - 1]),
            field.TYPE_FIXED64: lambda: random_source.choice([*NUMBERS, 2**64 - 1]),
        }
        setattr(message, field.name, kinds[field.type]())
    return message


def everything(rig: Rig) -> Any:
    """Returns the state but for what a repeated lease request may have granted to the fuzzer itself."""
    return rig.state()[-2], (rig.core.pool(POOL_ID).epoch, sorted(rig.core.pools))


async def ended(call: Any) -> grpc.StatusCode:
    """Returns how a stream ended."""
    async for _ in call:
        pass
    return await call.code()  # type: ignore[no-any-return]


@pytest.mark.parametrize("seed", range(6))
async def test_garbage_on_a_stream_ends_it_at_most_and_touches_nobody_else(seed: int) -> None:
    """Otherwise one broken gateway breaks all, or makes the log fill with internal errors."""
    random_source = random.Random(seed)
    async with grpc_rig(spec()) as rig, open_channel(rig.address) as channel:
        sequence = await rig.admit(prompt(40))
        await sequence.write()
        for number in range(40):
            call = memsvc_pb2_grpc.MemoryServiceStub(channel).Connect()
            hello = memsvc_pb2.Hello(gateway_id="fuzzer", gateway_incarnation=seed * 1000 + number + 1)
            await call.write(memsvc_pb2.ConnectRequest(hello=hello))
            kind = random_source.choice(["journal", "journal", "journal", "admit", "lease", "ping", "hello", None])
            message = memsvc_pb2.ConnectRequest()
            if kind is not None:
                filled(getattr(message, kind), random_source)
                getattr(message, kind).SetInParent()
            if kind == "journal" and random_source.random() < 0.9:
                message.journal.pool_id, message.journal.epoch, message.journal.journal_no = POOL_ID, rig.epoch, 1
            await call.write(message)
            await call.done_writing()
            try:
                status = await asyncio.wait_for(ended(call), 5)
            except grpc.aio.AioRpcError as error:
                status = error.code()
            assert status in EXPECTED, (status, message)
            rig.check()
        assert [table[0] for table in rig.state()[6] if table[1] == tuple(sequence.blocks)] == [sequence.table]
        again = await rig.admit([*prompt(40), 1])
        assert again.blocks[:2] == sequence.blocks[:2]
        assert isinstance(rig.gateway, StreamConnection)
        await rig.gateway.ping()


async def test_garbage_to_the_unary_calls_is_refused_and_changes_nothing() -> None:
    """Otherwise a tool with a typing error can break the service."""
    random_source = random.Random(11)
    async with grpc_rig(spec()) as rig, open_channel(rig.address) as channel:
        sequence = await rig.admit(prompt(40))
        await sequence.write()
        before = everything(rig)
        admin, memory = admin_pb2_grpc.AdminServiceStub(channel), memsvc_pb2_grpc.MemoryServiceStub(channel)
        calls = [
            (admin.ListPools, admin_pb2.ListPoolsRequest),
            (admin.GetPool, admin_pb2.GetPoolRequest),
            (admin.ListSequences, admin_pb2.ListSequencesRequest),
            (admin.GetBlockTable, admin_pb2.GetBlockTableRequest),
            (admin.GetBlock, admin_pb2.GetBlockRequest),
            (memory.Heartbeat, memsvc_pb2.HeartbeatRequest),
            (memory.RegisterPool, memsvc_pb2.RegisterPoolRequest),
        ]
        for method, request_type in calls:
            for _ in range(40):
                request = filled(request_type(), random_source)
                call = method(request, timeout=5)
                code = await call.code()
                assert code in EXPECTED, (code, await call.details(), request)
        assert everything(rig) == before


async def test_a_message_that_is_no_protobuf_is_an_invalid_argument() -> None:
    """Otherwise the caller is shown Python's inner text under UNKNOWN."""
    async with grpc_rig(spec()) as rig, open_channel(rig.address) as channel:
        for service, method in (("MemoryService", "RegisterPool"), ("AdminService", "GetBlockTable")):
            call = channel.unary_unary(f"/quire.memsvc.v1.{service}/{method}")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(b"\xff\xff\xff\xff", timeout=5)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        stream = channel.stream_stream("/quire.memsvc.v1.MemoryService/Connect")()
        await stream.write(b"\xff\xff\xff\xff")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ended(stream)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
