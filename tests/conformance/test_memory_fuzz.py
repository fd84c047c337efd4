"""Structured garbage at every RPC of the memory service: a clear status, and nothing changed.

The RPCs and the fields of their messages are found in the contracts, so that a new one is fuzzed from its first day.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
import random
from typing import Any

from google.protobuf import descriptor, message_factory
import grpc
import pytest

from protos.memsvc.v1 import admin_pb2, memsvc_pb2, memsvc_pb2_grpc
from quire.rpc import open_channel
from tests.conformance.memory_connections import POOL_ID, StreamConnection, pack, prompt, spec
from tests.conformance.memory_rig import Rig, RigSequence, grpc_rig, test_config

REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.PERMISSION_DENIED,
}
NUMBERS = [0, 1, 2, 3, 15, 16, 17, 31, 32, 33, 2**31 - 1, 2**31, 2**32 - 1]
LARGE = [*NUMBERS, 2**63 - 1, 2**64 - 1]
SIGNED = [0, 1, -1, 16, 10**9, -(2**31), 2**31 - 1]
TEXTS = ["", "a", POOL_ID, "\0", "é" * 300, "x" * 5000, "../..", "victim/0", "victim", "float32", "h:1", "pool_id"]
REALS = [0.0, 1.0, -1.0, 0.5, 1e308, float("inf"), float("nan")]
READERS = ("List", "Get", "Watch", "Explain", "Find", "History", "Simulate", "Heartbeat")
# Methods of a service, and the messages that a gateway's stream may carry.
METHODS = [
    method
    for file in (memsvc_pb2, admin_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
    if not method.client_streaming
]
KINDS = [field.name for field in memsvc_pb2.ConnectRequest.DESCRIPTOR.oneofs_by_name["message"].fields]


def column(source: random.Random) -> bytes:
    """Returns packed numbers, sometimes cut."""
    values = [source.choice(NUMBERS) for _ in range(source.randrange(7))]
    data = pack(values)
    return data[: source.randrange(len(data) + 1)] if source.random() < 0.2 else data


def value(field: descriptor.FieldDescriptor, source: random.Random) -> Any:
    """Returns a value for a field that is no message."""
    kinds: dict[int, Callable[[], Any]] = {
        field.TYPE_STRING: lambda: source.choice(TEXTS),
        field.TYPE_BYTES: lambda: column(source),
        field.TYPE_BOOL: lambda: source.random() < 0.5,
        field.TYPE_ENUM: lambda: source.choice([0, 1, 2, 3, 99]),
        field.TYPE_DOUBLE: lambda: source.choice(REALS),
        field.TYPE_FLOAT: lambda: source.choice(REALS[:4]),
    }
    for kind in (field.TYPE_UINT32, field.TYPE_FIXED32):
        kinds[kind] = lambda: source.choice(NUMBERS)
    for kind in (field.TYPE_UINT64, field.TYPE_FIXED64):
        kinds[kind] = lambda: source.choice(LARGE)
    for kind in (field.TYPE_INT32, field.TYPE_INT64, field.TYPE_SINT32, field.TYPE_SINT64):
        kinds[kind] = lambda: source.choice(SIGNED)
    return kinds[field.type]()


def filled(message: Any, source: random.Random) -> Any:
    """Returns `message` with its fields drawn at random, a quarter of them left out."""
    for field in message.DESCRIPTOR.fields:
        if source.random() < 0.25:
            continue
        if field.is_repeated:
            target = getattr(message, field.name)
            for _ in range(source.randrange(4)):
                if field.message_type is None:
                    target.append(value(field, source))
                elif field.message_type.GetOptions().map_entry:
                    filled_entry(field, target, source)
                else:
                    filled(target.add(), source)
        elif field.message_type is not None:
            filled(getattr(message, field.name), source).SetInParent()
        else:
            setattr(message, field.name, value(field, source))
    return message


def filled_entry(field: descriptor.FieldDescriptor, target: Any, source: random.Random) -> None:
    """Adds an entry to a map of plain values."""
    entry = field.message_type.fields_by_name
    target[value(entry["key"], source)] = value(entry["value"], source)


def everything(rig: Rig) -> tuple[Any, ...]:
    """Returns all that a refused message must not change."""
    pools = {
        pool_id: (pool.epoch, pool.ready, pool.registration, list(pool.superseded))
        for pool_id, pool in rig.core.pools.items()
    }
    grants = {number: held for number, held in rig.state()[7].items() if held[0] or held[2]}
    return (*rig.state()[:7], grants, rig.state()[8], pools)


async def victim(rig: Rig) -> RigSequence:
    """Opens a sequence that nobody but its gateway may touch, and leaves content in the cache."""
    await rig.run(prompt(40, 8))
    sequence = await rig.admit(prompt(40), request_id="victim")
    await sequence.write()
    await rig.lease(2)
    return sequence


async def unharmed(rig: Rig, sequence: RigSequence) -> None:
    """Checks that the sequence is as it was, and that its gateway is served."""
    rig.check()
    assert [table[1] for table in rig.state()[6] if table[0] == sequence.table] == [tuple(sequence.blocks)]
    assert isinstance(rig.gateway, StreamConnection)
    await rig.gateway.ping()


async def ended(call: Any) -> grpc.StatusCode:
    """Returns how a stream ended; one that goes on is cancelled."""
    try:
        async with asyncio.timeout(0.3):
            async for _ in call:
                pass
    except TimeoutError:
        call.cancel()
        return grpc.StatusCode.OK
    except grpc.aio.AioRpcError as error:
        return error.code()
    return await call.code()  # type: ignore[no-any-return]


def multicallable(channel: grpc.aio.Channel, method: descriptor.MethodDescriptor) -> Any:
    """Returns how a method is called."""
    kind = channel.unary_stream if method.server_streaming else channel.unary_unary
    return kind(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
    )


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
async def test_garbage_to_a_method_is_refused_and_changes_nothing(method: descriptor.MethodDescriptor) -> None:
    """Otherwise a tool with a typing error can break the service, or fill its log with internal errors."""
    source = random.Random(method.full_name)
    request_type = message_factory.GetMessageClass(method.input_type)
    async with grpc_rig(spec(), test_config(residency_every=1)) as rig, open_channel(rig.address) as channel:
        sequence = await victim(rig)
        invoke = multicallable(channel, method)
        refused = 0
        for number in range(8 if method.server_streaming else 80):
            request = filled(request_type(), source)
            if number % 2 and "pool_id" in request.DESCRIPTOR.fields_by_name:
                request.pool_id = POOL_ID
            if number % 8 and "read_mask" in request.DESCRIPTOR.fields_by_name:
                # Most masks are refused, and what is behind would never be reached.
                request.ClearField("read_mask")
            before = everything(rig)
            call = invoke(request, timeout=5)
            code = await (ended(call) if method.server_streaming else call.code())
            assert code in REFUSALS | {grpc.StatusCode.OK}, (code, await call.details(), request)
            refused += code is not grpc.StatusCode.OK
            if code is not grpc.StatusCode.OK or method.name.startswith(READERS):
                assert everything(rig) == before, request
            rig.check()
        assert refused or not request_type.DESCRIPTOR.fields
        if method.name.startswith(READERS):
            await unharmed(rig, sequence)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
async def test_garbage_on_a_stream_ends_it_at_most_and_touches_nobody_else(kind: str, seed: int) -> None:
    """Otherwise one broken gateway breaks all."""
    source = random.Random(f"{kind} {seed}")
    async with grpc_rig(spec()) as rig:
        sequence = await victim(rig)
        for number in range(12):
            stranger = rig.connect_raw(f"fuzzer-{number}")
            assert isinstance(stranger, StreamConnection)
            await stranger.start()
            message = memsvc_pb2.ConnectRequest()
            body = getattr(message, kind)
            filled(body, source)
            body.SetInParent()
            if "pool_id" in body.DESCRIPTOR.fields_by_name and source.random() < 0.8:
                body.pool_id, body.epoch = POOL_ID, rig.epoch
            if kind == "journal" and source.random() < 0.9:
                body.journal_no = 1
            before = everything(rig)
            await stranger.call.write(message)
            response = await asyncio.wait_for(stranger.responses.get(), 5)
            outcome = response.WhichOneof("message")
            if outcome is None:
                assert stranger.error is not None
                assert stranger.error.code in REFUSALS, (stranger.error, message)
            elif outcome == "refused":
                assert response.refused.code in {code.value[0] for code in REFUSALS}, response
            # It holds nothing: unless it is granted something, there is nothing that it could change.
            if outcome not in {"admitted", "lease_granted"}:
                assert everything(rig) == before, message
            rig.check()
            await stranger.close()
        await unharmed(rig, sequence)


async def test_a_stream_that_is_never_introduced_changes_nothing() -> None:
    """Otherwise a port scanner holds blocks."""
    source = random.Random(5)
    async with grpc_rig(spec()) as rig, open_channel(rig.address) as channel:
        await victim(rig)
        before = everything(rig)
        for kind in KINDS:
            call = memsvc_pb2_grpc.MemoryServiceStub(channel).Connect()
            message = memsvc_pb2.ConnectRequest()
            filled(getattr(message, kind), source)
            getattr(message, kind).SetInParent()
            message.hello.gateway_id = ""
            await call.write(message)
            await call.done_writing()
            assert await ended(call) in REFUSALS
        assert everything(rig) == before


async def test_a_message_that_is_no_protobuf_is_an_invalid_argument() -> None:
    """Otherwise the caller is shown Python's inner text under UNKNOWN."""
    async with grpc_rig(spec()) as rig, open_channel(rig.address) as channel:
        for method in METHODS:
            kind = channel.unary_stream if method.server_streaming else channel.unary_unary
            call = kind(f"/{method.containing_service.full_name}/{method.name}")(b"\xff\xff\xff\xff", timeout=5)
            code = await (ended(call) if method.server_streaming else call.code())
            assert code is grpc.StatusCode.INVALID_ARGUMENT, method.name
        stream = channel.stream_stream("/quire.memsvc.v1.MemoryService/Connect")()
        await stream.write(b"\xff\xff\xff\xff")
        assert await ended(stream) is grpc.StatusCode.INVALID_ARGUMENT
