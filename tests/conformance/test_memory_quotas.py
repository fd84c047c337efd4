"""Tenants' ceilings and floors: who may hold what, and what others' pressure leaves to whom."""

from __future__ import annotations

from typing import Any

import pytest

from protos.memsvc.v1 import admin_pb2
from quire.errors import (
    BlockPoolExhaustedError,
    InvalidRequestError,
    PoolNotFoundError,
    PromptTooLongError,
    TenantCeilingError,
)
from tests.conformance.memory_connections import POOL_ID, prompt
from tests.conformance.memory_rig import Rig


async def set_quota(rig: Rig, tenant: str, **fields: int) -> Any:
    """Sets a tenant's quota and returns what the tenant has."""
    quota = admin_pb2.Quota(**{f"{name}_block_count": value for name, value in fields.items()})
    request = admin_pb2.SetQuotaRequest(pool_id=POOL_ID, tenant=tenant, quota=quota)
    try:
        return (await rig.admin.SetQuota(request)).usage
    finally:
        rig.check()


async def usage(rig: Rig, tenant: str) -> tuple[int, int]:
    """Returns the blocks that a tenant holds and has cached."""
    found = (await rig.admin.GetQuota(admin_pb2.GetQuotaRequest(pool_id=POOL_ID, tenant=tenant))).usage
    return found.held_block_count, found.cached_block_count


async def test_a_tenant_at_its_ceiling_is_refused_with_its_numbers_and_others_are_served(rig: Rig) -> None:
    """Otherwise one tenant's burst takes the pool from everybody."""
    await set_quota(rig, "a", ceiling=5)
    first = await rig.admit(prompt(64), tenant="a")
    before = rig.state()
    with pytest.raises(TenantCeilingError, match="tenant 'a' holds 4 blocks and may hold 5; 2 more") as refused:
        await rig.admit(prompt(32, 1), tenant="a")
    figures = refused.value.metadata
    assert (figures["held_block_count"], figures["room_block_count"], figures["ceiling_block_count"]) == ("4", "1", "5")
    assert rig.state() == before
    await rig.admit(prompt(400, 2), tenant="b")
    await rig.admit(prompt(10, 3), tenant="a")
    await first.write()
    await first.close()
    assert await usage(rig, "a") == (1, 4)
    await rig.admit(prompt(32, 1), tenant="a")


async def test_the_growth_of_what_runs_is_set_aside_under_a_ceiling(rig: Rig) -> None:
    """Otherwise sequences that were admitted grow beyond the ceiling, and nothing can stop them."""
    await set_quota(rig, "a", ceiling=6)
    running = await rig.admit(prompt(16), tenant="a", max_new_tokens=33)
    with pytest.raises(TenantCeilingError, match="2 are left beside"):
        await rig.admit(prompt(33, 1), tenant="a")
    second = await rig.admit(prompt(10, 1), tenant="a", max_new_tokens=22)
    with pytest.raises(TenantCeilingError):
        await rig.admit(prompt(1, 2), tenant="a")
    await running.extend(prompt(33, 5))
    await second.extend(prompt(22, 6))
    assert await usage(rig, "a") == (6, 0)


async def test_what_can_never_fit_under_a_ceiling_is_refused_at_once(rig: Rig) -> None:
    """Otherwise it waits for ever, at the head of the queue."""
    await set_quota(rig, "a", ceiling=4)
    with pytest.raises(PromptTooLongError, match="need 5 blocks, tenant 'a' may hold 4"):
        await rig.admit(prompt(65), tenant="a")
    with pytest.raises(PromptTooLongError, match="40 tokens to come need 5 blocks"):
        await rig.admit(prompt(30), tenant="a", max_new_tokens=40)
    await rig.admit(prompt(64), tenant="a")


async def test_a_shared_block_counts_once_and_blocks_of_other_tenants_not_at_all(rig: Rig) -> None:
    """Otherwise a popular prompt uses up a ceiling by being popular."""
    first = await rig.admit([*prompt(48), 1], tenant="a")
    await first.write()
    stranger = await rig.admit([*prompt(48), 1], tenant="b")
    await set_quota(rig, "a", ceiling=6)
    assert await usage(rig, "a") == (4, 0)
    second = await rig.admit([*prompt(48), 2], tenant="a")
    assert await usage(rig, "a") == (5, 0)
    await rig.admit([*prompt(48), 3], tenant="a")
    with pytest.raises(TenantCeilingError):
        await rig.admit([*prompt(48), 4], tenant="a")
    await second.close()
    await first.close()
    # What only one table names still is held; what none names is cached.
    assert await usage(rig, "a") == (4, 1)
    assert await usage(rig, "b") == (4, 0)
    await stranger.close()
    assert await usage(rig, "b") == (0, 0)


async def test_the_pressure_of_others_evicts_nothing_below_a_floor(rig: Rig) -> None:
    """Otherwise a quiet tenant computes its prompts anew whenever a busy one was there."""
    await rig.run(prompt(96), tenant="quiet")
    await rig.run(prompt(96, 1), tenant="busy")
    await rig.admit(prompt(16, 3), tenant="busy")
    await set_quota(rig, "quiet", floor=5)
    before = rig.state()
    with pytest.raises(BlockPoolExhaustedError, match="27 blocks are needed and 26 are available"):
        await rig.admit(prompt(27 * 16, 2), tenant="other")
    assert rig.state() == before
    full = await rig.admit(prompt(25 * 16, 2), tenant="other")
    assert await usage(rig, "quiet") == (0, 5)
    again = await rig.admit([*prompt(80), 1, 2], tenant="quiet")
    assert again.admission.cached_token_count == 80
    await full.close()
    assert await usage(rig, "quiet") == (6, 0)


async def test_a_floor_does_not_stand_in_its_own_tenants_way(rig: Rig) -> None:
    """Otherwise a tenant with a floor cannot use the blocks that are kept for it."""
    await set_quota(rig, "a", floor=20)
    await rig.run(prompt(320), tenant="a")
    other = await rig.admit(prompt(320, 1), tenant="a")
    assert await usage(rig, "a") == (20, 12)
    await other.close()


async def test_what_is_above_a_floor_is_evicted_in_the_usual_order(rig: Rig) -> None:
    """A floor says how much is kept, not of whom everything else is taken."""
    await set_quota(rig, "a", floor=3)
    first = await rig.run(prompt(64), tenant="b")
    second = await rig.run(prompt(80, 1), tenant="a")
    third = await rig.run(prompt(32, 2), tenant="b")
    taken = await rig.lease(32)
    cached = [*first.blocks[::-1], *second.blocks[::-1][:2], *third.blocks[::-1]]
    assert taken[-len(cached) :] == cached
    assert len(taken) == 29
    assert await rig.lease(1) == []


async def test_floors_yield_to_the_growth_of_a_last_sequence(rig: Rig) -> None:
    """It has nobody to preempt: without a block it would stand still for ever."""
    await set_quota(rig, "quiet", floor=8)
    await rig.run(prompt(128), tenant="quiet")
    running = await rig.admit(prompt(24 * 16), tenant="busy")
    assert await usage(rig, "quiet") == (0, 8)
    await running.extend(prompt(40, 7))
    assert await usage(rig, "busy") == (27, 0)
    held, cached = await usage(rig, "quiet")
    assert held == 0
    assert 4 <= cached <= 5


async def test_a_gateway_that_can_preempt_gets_nothing_from_below_a_floor(rig: Rig) -> None:
    """Otherwise the growth of many takes what admissions may not."""
    await set_quota(rig, "quiet", floor=8)
    await rig.run(prompt(128), tenant="quiet")
    await rig.admit(prompt(12 * 16), tenant="busy")
    await rig.admit(prompt(12 * 16, 1), tenant="busy")
    assert await rig.lease(4) == []
    assert await usage(rig, "quiet") == (0, 8)


async def test_what_never_fits_beside_the_floors_is_refused_at_once(rig: Rig) -> None:
    """A floor that is empty now may be filled at any time: such a request may wait for ever."""
    await set_quota(rig, "a", floor=10)
    await set_quota(rig, "b", floor=10)
    with pytest.raises(PromptTooLongError, match="13 blocks are needed; of 32 blocks 20 are kept"):
        await rig.admit(prompt(13 * 16), tenant="c")
    with pytest.raises(PromptTooLongError, match="10 are kept"):
        await rig.admit(prompt(23 * 16), tenant="a")
    await rig.admit(prompt(12 * 16), tenant="c")


async def test_quotas_outlive_the_epoch(rig: Rig) -> None:
    """Otherwise the restart of an executor lifts every limit."""
    await set_quota(rig, "a", ceiling=2, floor=1)
    await rig.admit(prompt(20), tenant="a")
    answer = await rig.admin.ResetCache(admin_pb2.ResetCacheRequest(pool_id=POOL_ID, force=True))
    rig.epoch = answer.epoch
    assert await usage(rig, "a") == (0, 0)
    with pytest.raises(PromptTooLongError):
        await rig.admit(prompt(33), tenant="a")


async def test_quotas_are_listed_page_by_page_and_taken_away(rig: Rig) -> None:
    """Otherwise nobody knows who is limited, or can end it."""
    for tenant in ("c", "", "b"):
        await set_quota(rig, tenant, ceiling=3, retained=2)
    request = admin_pb2.ListQuotasRequest(pool_id=POOL_ID, page_size=2)
    first = await rig.admin.ListQuotas(request)
    request.page_token = first.next_page_token
    rest = await rig.admin.ListQuotas(request)
    assert [one.tenant for one in [*first.usages, *rest.usages]] == ["", "b", "c"]
    assert rest.next_page_token == ""
    assert first.usages[0].quota.ceiling_block_count == 3
    assert (await set_quota(rig, "b")).quota == admin_pb2.Quota()
    found = await rig.admin.ListQuotas(admin_pb2.ListQuotasRequest(pool_id=POOL_ID))
    assert [one.tenant for one in found.usages] == ["", "c"]
    await rig.admit(prompt(200), tenant="b")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ceiling": 0}, "ceiling_block_count: found 0, allowed are 1 .. 32"),
        ({"ceiling": 33}, "ceiling_block_count: found 33"),
        ({"floor": 33}, "floor_block_count: found 33, allowed are 0 .. 32"),
        ({"retained": 33}, "retained_block_count: found 33"),
        ({"pinned": 33}, "pinned_block_count: found 33"),
        ({"floor": 5, "ceiling": 4}, "ceiling_block_count: found 4, less than the floor or the pins, 5"),
        ({"floor": 22}, "22 blocks and the 10 of other tenants' floors and pins leave none of 32"),
    ],
)
async def test_an_impossible_quota_is_refused_and_changes_nothing(
    rig: Rig, fields: dict[str, int], message: str
) -> None:
    """Otherwise a typing error locks everybody out."""
    await set_quota(rig, "a", floor=10)
    await set_quota(rig, "b", ceiling=9)
    with pytest.raises(InvalidRequestError, match=message):
        await set_quota(rig, "b", **fields)
    found = await rig.admin.GetQuota(admin_pb2.GetQuotaRequest(pool_id=POOL_ID, tenant="b"))
    assert found.usage.quota == admin_pb2.Quota(ceiling_block_count=9)


async def test_quotas_of_what_is_not_there_are_refused(rig: Rig) -> None:
    """Otherwise a typing error looks like a limit."""
    with pytest.raises(PoolNotFoundError):
        await rig.admin.SetQuota(admin_pb2.SetQuotaRequest(pool_id="x", tenant="a"))
    with pytest.raises(PoolNotFoundError):
        await rig.admin.GetQuota(admin_pb2.GetQuotaRequest(pool_id="x"))
    with pytest.raises(PoolNotFoundError):
        await rig.admin.ListQuotas(admin_pb2.ListQuotasRequest(pool_id="x"))
    with pytest.raises(InvalidRequestError, match="tenant: 513 characters"):
        await rig.admin.GetQuota(admin_pb2.GetQuotaRequest(pool_id=POOL_ID, tenant="x" * 513))
