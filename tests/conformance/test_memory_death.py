"""Rows 66, 70, 71 and 74 of the behaviour of memory: gateways and executors that die, and the fences in between."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
import time
from typing import Any

import grpc
import pytest

from memsvc import translate
from protos.memsvc.v1 import admin_pb2, memsvc_pb2, memsvc_pb2_grpc
from quire import status
from quire.errors import InvalidRequestError, PoolNotFoundError, StaleEpochError
from quire.memory import JournalEntry, PoolUpdated
from quire.rpc import open_channel
from tests.conformance.memory_connections import POOL_ID, StreamConnection, prompt, spec
from tests.conformance.memory_rig import Rig, grpc_rig, test_config

FAST = {"lease_ttl": 0.6, "heartbeat_interval": 0.05}


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 5.0) -> None:
    """Waits for `condition`."""
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        await asyncio.sleep(0.02)


async def call(rig: Rig, method: str, **fields: Any) -> Any:
    """Calls the memory service as an executor does."""
    request_type = {"RegisterPool": memsvc_pb2.RegisterPoolRequest, "Heartbeat": memsvc_pb2.HeartbeatRequest}[method]
    async with open_channel(rig.address) as channel:
        try:
            return await getattr(memsvc_pb2_grpc.MemoryServiceStub(channel), method)(request_type(**fields), timeout=5)
        except grpc.aio.AioRpcError as error:
            raise status.from_rpc_error(error) from error


def registration(**fields: Any) -> dict[str, Any]:
    """Returns the fields of a registration that is fine but for `fields`."""
    good = {
        "executor_id": POOL_ID,
        "executor_incarnation": 7,
        "address": "127.0.0.1:1",
        "spec": translate.from_spec(spec()),
    }
    return {**good, **fields}


class Beating:
    """Keeps the pool of a rig alive."""

    def __init__(self, rig: Rig, incarnation: int = 7) -> None:
        self._rig = rig
        self._incarnation = incarnation

    async def __aenter__(self) -> None:
        self._task = asyncio.create_task(self._beat())

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _beat(self) -> None:
        while True:
            await call(self._rig, "Heartbeat", executor_id=POOL_ID, executor_incarnation=self._incarnation)
            await asyncio.sleep(0.05)


@pytest.mark.invariant(11)
@pytest.mark.parametrize("how", ["goodbye", "break", "silence", "reconnect"])
async def test_rows_70_and_74_a_gateway_that_is_gone_is_fenced_before_its_blocks_are_free(how: str) -> None:
    """Otherwise a step in flight writes into a block that another sequence was just given."""
    async with grpc_rig(spec(), test_config(**FAST)) as rig, Beating(rig):
        assert rig.executor is not None
        dying = rig.connect_raw("dying")
        assert isinstance(dying, StreamConnection)
        await dying.start()
        rig.executor.allowed.clear()
        sequence = await rig.admit(prompt(40), dying)
        await sequence.write()
        await rig.lease(3, dying)
        if how == "goodbye":
            await dying.close()
        elif how == "break":
            await dying.abort()
        elif how == "reconnect":
            again = rig.connect_raw("dying")
            assert isinstance(again, StreamConnection)
            await again.start()
            task = asyncio.create_task(keep_alive(again))
        await until(lambda: pending_is(rig, 6))
        assert rig.executor.fenced == []
        (closing,) = (await rig.admin.ListSequences(admin_pb2.ListSequencesRequest())).sequences
        assert closing.state == admin_pb2.SEQUENCE_STATE_CLOSING
        assert "waits for the executor's fence" in (await rig.block(sequence.blocks[0])).explanation
        rig.executor.allowed.set()
        await until(lambda: pending_is(rig, 0))
        assert rig.executor.fenced == [dying.incarnation]
        pool = await rig.pool()
        assert (pool.cached_block_count, pool.free_block_count) == (3, 29)
        if how == "reconnect":
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        if how != "goodbye":
            assert dying.error is not None


async def keep_alive(connection: StreamConnection) -> None:
    """Pings."""
    while True:
        await connection.send(ping=memsvc_pb2.Ping())
        await asyncio.sleep(0.05)


async def pending_is(rig: Rig, count: int) -> bool:
    """Returns whether `count` blocks wait for a fence."""
    return bool((await rig.pool()).pending_free_block_count == count)


async def test_row_74_a_fence_is_repeated_until_the_executor_answers() -> None:
    """Otherwise blocks of a dead gateway are lost when one call fails."""
    async with grpc_rig(spec(), test_config(**FAST, fence_timeout=0.1)) as rig, Beating(rig):
        assert rig.executor is not None
        rig.executor.allowed.clear()
        dying = rig.connect_raw("dying")
        assert isinstance(dying, StreamConnection)
        await dying.start()
        await rig.admit(prompt(40), dying)
        await dying.close()
        await asyncio.sleep(0.5)
        assert await pending_is(rig, 3)
        rig.executor.allowed.set()
        await until(lambda: pending_is(rig, 0))


async def test_a_gateway_that_holds_nothing_goes_without_a_fence() -> None:
    """Otherwise idle gateways disturb the executor."""
    async with grpc_rig(spec(), test_config(**FAST)) as rig, Beating(rig):
        idle = rig.connect_raw("idle")
        assert isinstance(idle, StreamConnection)
        await idle.start()
        await idle.close()
        await asyncio.sleep(0.2)
        assert rig.executor is not None
        assert rig.executor.fenced == []


async def test_row_66_a_silent_executor_loses_its_pool_and_everything_in_it() -> None:
    """Otherwise gateways are granted blocks of a device that is not there."""
    async with grpc_rig(spec(), test_config(**FAST)) as rig:
        sequence = await rig.admit(prompt(40))
        await sequence.write()
        assert isinstance(rig.gateway, StreamConnection)
        ticking = asyncio.create_task(keep_alive(rig.gateway))
        await until(lambda: lost(rig))
        pool = await rig.pool()
        assert pool.epoch == rig.epoch + 1
        assert (pool.used_block_count, pool.cached_block_count, pool.sequence_count) == (0, 0, 0)
        with pytest.raises(PoolNotFoundError, match="register again"):
            await call(rig, "Heartbeat", executor_id=POOL_ID, executor_incarnation=7)
        registered = await call(rig, "RegisterPool", **registration())
        assert registered.epoch > pool.epoch
        ticking.cancel()
        await asyncio.gather(ticking, return_exceptions=True)
        heard = [(e.pool.epoch, e.pool.ready) for e in rig.gateway.events if isinstance(e, PoolUpdated)]
        assert heard[:2] == [(rig.epoch, True), (rig.epoch + 1, False)]


async def lost(rig: Rig) -> bool:
    """Returns whether the pool is lost."""
    return bool((await rig.pool()).state == memsvc_pb2.POOL_STATE_LOST)


@pytest.mark.invariant(7)
async def test_rows_66_and_71_a_new_incarnation_of_an_executor_voids_the_old_one() -> None:
    """Otherwise a restarted executor, whose memory is empty, is believed to hold old content."""
    async with grpc_rig(spec()) as rig:
        sequence = await rig.admit(prompt(40))
        await sequence.write()
        assert (await call(rig, "RegisterPool", **registration())).epoch == rig.epoch
        new = await call(rig, "RegisterPool", **registration(executor_incarnation=8))
        assert new.epoch > rig.epoch
        with pytest.raises(StaleEpochError):
            await call(rig, "RegisterPool", **registration())
        with pytest.raises(StaleEpochError):
            await call(rig, "Heartbeat", executor_id=POOL_ID, executor_incarnation=7)
        with pytest.raises(StaleEpochError):
            await rig.admit(prompt(40))
        await rig.gateway.journal(JournalEntry(POOL_ID, rig.epoch, closed=[sequence.table], close_reasons=[1]))
        rig.epoch = new.epoch
        fresh = await rig.admit(prompt(40))
        assert fresh.admission.cached_token_count == 0
        assert fresh.blocks == [1, 2, 3]


@pytest.mark.parametrize(
    "fields",
    [
        {"executor_id": ""},
        {"executor_id": "e" * 129},
        {"executor_incarnation": 0},
        {"address": ""},
        {"spec": memsvc_pb2.PoolSpec()},
        {"spec": memsvc_pb2.PoolSpec(block_count=2**31, block_size=16, model_id="m", kv_dtype="float32")},
        {"spec": memsvc_pb2.PoolSpec(block_count=9, block_size=17, model_id="m", kv_dtype="float32", max_model_len=9)},
        {"spec": memsvc_pb2.PoolSpec(block_count=9, block_size=16, model_id="m", kv_dtype="int3", max_model_len=9)},
        {"executor_incarnation": 9, "epoch_floor": 2**32 - 1},
        {"spec": translate.from_spec(spec(usable=9))},
    ],
)
async def test_a_pool_that_cannot_be_is_refused_and_changes_nothing(fields: dict[str, Any]) -> None:
    """Otherwise one confused executor takes the whole memory service down."""
    async with grpc_rig(spec()) as rig:
        await rig.admit(prompt(40))
        before = rig.state()
        with pytest.raises(InvalidRequestError) as caught:
            await call(rig, "RegisterPool", **registration(**fields))
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
        assert rig.state() == before
        assert (await rig.pool()).epoch == rig.epoch


@pytest.mark.parametrize(
    "first",
    [
        {"ping": memsvc_pb2.Ping()},
        {},
        {"hello": memsvc_pb2.Hello(gateway_incarnation=1)},
        {"hello": memsvc_pb2.Hello(gateway_id="g")},
        {"hello": memsvc_pb2.Hello(gateway_id="g" * 129, gateway_incarnation=1)},
    ],
)
async def test_a_stream_that_does_not_begin_with_a_good_hello_is_refused(first: dict[str, Any]) -> None:
    """Otherwise blocks are granted to nobody."""
    async with grpc_rig(spec()) as rig:
        stranger = rig.connect_raw("stranger")
        assert isinstance(stranger, StreamConnection)
        stranger.call = memsvc_pb2_grpc.MemoryServiceStub(stranger._channel).Connect()
        await stranger.send(**first)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stranger.call:
                pass
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        stranger.call = None


async def test_a_silent_stranger_is_not_waited_for() -> None:
    """Otherwise half-open streams pile up."""
    config = test_config(lease_ttl=0.3, heartbeat_interval=0.05)
    async with grpc_rig(spec(), config) as rig, open_channel(rig.address) as channel:
        stream = memsvc_pb2_grpc.MemoryServiceStub(channel).Connect()
        await stream.wait_for_connection()
        assert await asyncio.wait_for(stream.code(), 5) is grpc.StatusCode.DEADLINE_EXCEEDED
