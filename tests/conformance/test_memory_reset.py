"""Rows 30, 31 and 59 of the behaviour of memory: everything cached is forgotten at an operator's word."""

from __future__ import annotations

import asyncio

import pytest

from memsvc.core.events import BlocksStored, CacheCleared
from protos.memsvc.v1 import admin_pb2
from quire.errors import CacheInUseError, PoolNotFoundError, StaleEpochError
from quire.memory import PoolUpdated
from tests.conformance.memory_connections import POOL_ID, TIMEOUT, prompt, spec
from tests.conformance.memory_rig import Rig, local_rig


async def reset(rig: Rig, *, force: bool = False, pool_id: str = POOL_ID) -> admin_pb2.ResetCacheResponse:
    """Resets the cache, and checks what must hold then."""
    try:
        answer: admin_pb2.ResetCacheResponse = await rig.admin.ResetCache(
            admin_pb2.ResetCacheRequest(pool_id=pool_id, force=force)
        )
    finally:
        rig.check()
    return answer


@pytest.mark.row(30)
async def test_row_30_a_reset_is_refused_while_a_sequence_holds_blocks_and_says_so(rig: Rig) -> None:
    """Otherwise a sequence reads what somebody else writes."""
    await rig.run(prompt(40))
    running = await rig.admit([*prompt(32), 7, 8])
    before = rig.state()
    with pytest.raises(CacheInUseError, match="1 sequences hold 3 blocks") as refused:
        await reset(rig)
    assert refused.value.metadata["sequence_count"] == "1"
    assert rig.state() == before
    await running.write()
    await running.close()
    answer = await reset(rig)
    assert (answer.block_count, answer.epoch) == (4, rig.epoch)


@pytest.mark.row(30)
async def test_row_30_after_a_reset_nothing_matches_and_every_block_is_blank(rig: Rig) -> None:
    """Otherwise an operator who changed the weights serves keys and values of the old ones."""
    for length in (16, 40, 90):
        await rig.run(prompt(length, length))
    await rig.lease(2)
    await reset(rig)
    pool = await rig.pool()
    assert (pool.cached_block_count, pool.leased_block_count, pool.free_block_count) == (0, 2, 30)
    for length in (16, 40, 90):
        again = await rig.admit(prompt(length, length))
        assert (again.admission.cached_token_count, again.admission.copies) == (0, [])
        await again.write()
        await again.close()
    assert (await rig.admit([*prompt(40, 40), 1])).admission.cached_token_count == 40


@pytest.mark.row(30)
async def test_row_30_a_reset_waits_for_what_a_dead_gateway_held(rig: Rig) -> None:
    """Blocks that an executor may still write to are not blank."""
    dying = rig.connect_raw("dying")
    await dying.start()  # type: ignore[attr-defined]
    await rig.admit(prompt(20), dying)
    if rig.executor is not None:
        rig.executor.allowed.clear()
    else:
        rig.core.disconnect_gateway(rig.core.gateways[-1].number, 1.0)
    if rig.kind == "grpc":
        await dying.close()
        async with asyncio.timeout(TIMEOUT):
            while (await rig.pool()).pending_free_block_count != 2:
                await asyncio.sleep(0.01)
    with pytest.raises(CacheInUseError, match="2 wait for a fence"):
        await reset(rig)
    if rig.executor is not None:
        rig.executor.allowed.set()


@pytest.mark.row(31)
async def test_row_31_a_forced_reset_voids_every_table_tells_the_gateways_and_succeeds(rig: Rig) -> None:
    """Otherwise one long request keeps an operator from ever clearing the cache."""
    await rig.run(prompt(40))
    held = [await rig.admit(prompt(20, seed), request_id=f"r{seed}") for seed in (1, 2)]
    await rig.lease(3)
    old = rig.epoch
    answer = await reset(rig, force=True)
    assert answer.block_count == 3 + 4
    assert answer.epoch > old
    pool = await rig.pool()
    assert (pool.free_block_count, pool.sequence_count, pool.epoch) == (32, 0, answer.epoch)
    with pytest.raises(StaleEpochError):
        await rig.admit(prompt(5))
    # A late journal of the old epoch is taken and changes nothing.
    await rig.journal(closed=[held[0].table], close_reasons=[1])
    told = [event.pool for event in rig.gateway.events if isinstance(event, PoolUpdated)]
    assert (told[-1].epoch, told[-1].ready) == (answer.epoch, True)
    rig.epoch = answer.epoch
    again = [await rig.admit(prompt(20, seed), request_id=f"r{seed}") for seed in (1, 2)]
    assert [sequence.admission.cached_token_count for sequence in again] == [0, 0]
    assert [sequence.blocks for sequence in again] == [[1, 2], [3, 4]]


@pytest.mark.row(31)
async def test_row_31_force_does_not_disturb_a_pool_that_nobody_uses(rig: Rig) -> None:
    """An epoch that rises without need makes every gateway begin anew."""
    await rig.run(prompt(40))
    answer = await reset(rig, force=True)
    assert (answer.block_count, answer.epoch) == (3, rig.epoch)
    assert (await reset(rig)).block_count == 0


async def test_a_reset_of_an_unknown_pool_is_not_found(rig: Rig) -> None:
    """Otherwise a typing error looks like a reset."""
    for force in (False, True):
        with pytest.raises(PoolNotFoundError, match="known are executor-0"):
            await reset(rig, pool_id="executor-1", force=force)


@pytest.mark.row(59)
@pytest.mark.parametrize("running", [False, True])
async def test_row_59_a_reset_is_told_of_as_one_clear(running: bool) -> None:
    """Otherwise another replica goes on sending prompts to a pool that holds nothing of them."""
    async with local_rig(spec(), cache_events=True) as rig:
        await rig.run(prompt(90))
        if running:
            await rig.admit(prompt(20))
        assert [type(event) for event in rig.core.take_cache_events(POOL_ID)] == [BlocksStored]
        rig.epoch = (await reset(rig, force=running)).epoch
        assert rig.core.take_cache_events(POOL_ID) == [CacheCleared()]
        assert rig.core.take_cache_events(POOL_ID) == []
