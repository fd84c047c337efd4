"""Row 62 of the behaviour of memory: how long blocks stay, sampled."""

from __future__ import annotations

import numpy as np
import pytest

from memsvc.core.residency import ResidencySampler
from protos.memsvc.v1 import admin_pb2
from tests.conformance.conftest import OpenRig
from tests.conformance.memory_connections import POOL_ID, prompt, spec
from tests.conformance.memory_rig import Rig, grpc_rig, local_rig, test_config


async def lives(rig: Rig, **fields: object) -> admin_pb2.ListResidenciesResponse:
    """Returns the lives that operators see."""
    found = await rig.admin.ListResidencies(admin_pb2.ListResidenciesRequest(pool_id=POOL_ID, **fields))
    assert isinstance(found, admin_pb2.ListResidenciesResponse)
    return found


async def scenario(rig: Rig) -> None:
    """Fills three blocks, hits them six times, evicts them."""
    first = await rig.run(prompt(48))
    for number in range(6):
        again = await rig.admit([*prompt(48), number], skip_cache_write=True)
        await again.close()
    evicted = await rig.lease(32)
    assert set(first.blocks) <= set(evicted)
    found = [life for life in (await lives(rig)).residencies if life.block_id in first.blocks]
    assert [len(life.accesses) for life in found] == [4, 4, 4]
    for life in found:
        assert life.lifetime.ToNanoseconds() >= life.idle.ToNanoseconds() >= 0
    page = await lives(rig, page_size=2)
    rest = await lives(rig, page_size=1000, page_token=page.next_page_token)
    assert [*page.residencies, *rest.residencies] == list((await lives(rig)).residencies)
    await rig.journal(returned=evicted)
    count = len((await lives(rig)).residencies)
    await rig.admin.ResetCache(admin_pb2.ResetCacheRequest(pool_id=POOL_ID))
    assert count and not (await lives(rig)).residencies


async def test_row_62_lives_of_blocks_are_listed_and_cleared_on_reset_in_process() -> None:
    """Otherwise nobody can tell whether a larger pool would help."""
    async with local_rig(spec(), residency_every=1) as rig:
        await scenario(rig)


async def test_row_62_lives_of_blocks_are_listed_and_cleared_on_reset_over_grpc() -> None:
    """Otherwise nobody can tell whether a larger pool would help."""
    async with grpc_rig(spec(), test_config(residency_every=1)) as rig:
        await scenario(rig)


async def test_row_62_nothing_is_recorded_unless_it_was_asked_for(open_rig: OpenRig) -> None:
    """Otherwise everybody pays for what nobody reads."""
    async with open_rig(spec()) as rig:
        await rig.run(prompt(48))
        await rig.lease(32)
        assert rig.core.pool(POOL_ID).memory.pool.residencies is None
        assert not (await lives(rig)).residencies


@pytest.mark.parametrize("every", [1, 3, 7])
def test_row_62_only_every_nth_block_is_followed(every: int) -> None:
    """Otherwise sampling costs as much as following everything, or follows some blocks and never others."""
    sampler = ResidencySampler(100, every)
    blocks = np.arange(1, 61)
    for start in range(0, 60, 5):
        sampler.taken(blocks[start : start + 5], 1.0)
    sampler.accessed(blocks, 2.0)
    sampler.released(blocks, np.ones(60, np.bool_), 3.0)
    sampler.taken(blocks[:30], 5.0)
    records = sampler.records(0, 1000)
    assert [life.block_id for life in records] == list(range(1, 31, every))
    assert {(life.lifetime, life.idle, tuple(life.accesses)) for life in records} == {(4.0, 2.0, (2.0,))}
