"""Who watches a pool sees everything once, and then what changes."""

from __future__ import annotations

import asyncio
from typing import Any

from google.protobuf import duration_pb2
import grpc
import pytest

from memsvc import admin_watch
from memsvc.admin_watch import PoolDifference
from protos.memsvc.v1 import admin_pb2, admin_pb2_grpc
from quire import status
from quire.errors import PoolNotFoundError
from quire.rpc import open_channel
from tests.conformance.memory_connections import POOL_ID, prompt, spec
from tests.conformance.memory_rig import Rig, grpc_rig


async def test_first_everything_is_told_then_what_changes_and_nothing_else(rig: Rig) -> None:
    """A picture that is sent whole each time costs what runs, not what changes."""
    first = await rig.admit(prompt(40, 1), request_id="a")
    difference = PoolDifference(POOL_ID)
    (told,) = difference.take(rig.core, 1.0)
    assert [one.sequence_id for one in told.sequences] == ["a/0"]
    assert (told.pool.sequence_count, told.pool.used_block_count) == (1, 3)
    assert not difference.take(rig.core, 2.0), "nothing has changed, but for ages"
    second = await rig.admit(prompt(20, 2), request_id="b")
    await first.write()
    (told,) = difference.take(rig.core, 3.0)
    assert [(one.sequence_id, one.written_token_count) for one in told.sequences] == [("a/0", 40), ("b/0", 0)]
    await second.write()
    (told,) = difference.take(rig.core, 4.0)
    assert [one.sequence_id for one in told.sequences] == ["b/0"]
    ordinal = told.sequences[0].ordinal
    await second.close()
    (told,) = difference.take(rig.core, 5.0)
    assert (list(told.gone_ordinals), list(told.sequences), told.pool.sequence_count) == ([ordinal], [], 1)


async def test_what_is_long_comes_in_messages_of_one_moment(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool of thousands of sequences must not exceed the size of a message."""
    monkeypatch.setattr(admin_watch, "_CHUNK", 2)
    opened = [await rig.admit(prompt(17, index), request_id=f"r{index}") for index in range(5)]
    difference = PoolDifference(POOL_ID)
    told = difference.take(rig.core, 1.0)
    assert [len(one.sequences) for one in told] == [2, 2, 1]
    assert [one.HasField("pool") for one in told] == [False, False, True]
    for sequence in opened[:3]:
        await sequence.write()
        await sequence.close()
    told = difference.take(rig.core, 2.0)
    assert [len(one.gone_ordinals) for one in told] == [2, 1]
    assert [one.HasField("pool") for one in told] == [False, True]


async def test_a_pool_that_goes_ends_the_watching(rig: Rig) -> None:
    """Otherwise a picture of what is not there any more stays for ever."""
    with pytest.raises(PoolNotFoundError):
        PoolDifference("other").take(rig.core, 1.0)


def _request(seconds: float | None = None, pool_id: str = POOL_ID) -> admin_pb2.WatchPoolRequest:
    request = admin_pb2.WatchPoolRequest(pool_id=pool_id)
    if seconds is not None:
        request.min_interval.CopyFrom(duration_pb2.Duration(nanos=round(seconds % 1 * 1e9), seconds=int(seconds)))
    return request


async def _refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(10):
            await call.read()
    return caught.value


async def test_over_grpc_changes_come_as_they_happen_and_watchers_are_bounded() -> None:
    """Each looks at every sequence each time, so a crowd of them would be a load of its own."""
    async with grpc_rig(spec()) as rig, open_channel(rig.address) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        calls = [stub.WatchPool(_request(0.1)) for _ in range(admin_watch.WATCHERS)]
        async with asyncio.timeout(20):
            for call in calls:
                assert (await call.read()).pool.pool_id == POOL_ID
            refused = await _refusal(stub.WatchPool(_request()))
            assert refused.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            error = status.from_rpc_error(refused)
            assert error.reason == "TOO_MANY_WATCHERS"
            assert error.retry_after == 1.0
            await rig.admit(prompt(17), request_id="new")
            for call in calls:
                assert [one.sequence_id for one in (await call.read()).sequences] == ["new/0"]
            for call in calls:
                call.cancel()
            # Who has left makes room.
            while True:
                call = stub.WatchPool(_request())
                try:
                    assert len((await call.read()).sequences) == 1
                    break
                except grpc.aio.AioRpcError:
                    await asyncio.sleep(0.05)
            call.cancel()


@pytest.mark.parametrize("seconds", [0.0, 0.05, 61.0])
async def test_an_interval_out_of_range_is_refused(seconds: float) -> None:
    """Zero would be a busy loop for whoever forgets the unit."""
    async with grpc_rig(spec()) as rig, open_channel(rig.address) as channel:
        refused = await _refusal(admin_pb2_grpc.AdminServiceStub(channel).WatchPool(_request(seconds)))
        assert refused.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert f"min_interval: found {seconds:g} s, allowed is 0.1 s .. 60 s" in (refused.details() or "")
        unknown = await _refusal(admin_pb2_grpc.AdminServiceStub(channel).WatchPool(_request(pool_id="other")))
        assert unknown.code() == grpc.StatusCode.NOT_FOUND
