"""Row 77 of the behaviour of memory: what is retained outlives strangers, yields to need, and decays."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from protos.memsvc.v1 import admin_pb2
from quire.errors import InvalidRequestError
from tests.conformance.conftest import OpenRig
from tests.conformance.memory_connections import POOL_ID, prompt, spec
from tests.conformance.memory_rig import Rig

SYSTEM = prompt(1024)


@pytest_asyncio.fixture
async def large(open_rig: OpenRig) -> AsyncIterator[Rig]:
    """A memory service with 128 blocks of 16 tokens."""
    async with open_rig(spec(128)) as opened:
        yield opened


async def allow(rig: Rig, tenant: str, blocks: int) -> None:
    """Lets a tenant retain so many blocks."""
    quota = admin_pb2.Quota(retained_block_count=blocks)
    await rig.admin.SetQuota(admin_pb2.SetQuotaRequest(pool_id=POOL_ID, tenant=tenant, quota=quota))


async def usage(rig: Rig, tenant: str = "") -> Any:
    """Returns what a tenant has."""
    return (await rig.admin.GetQuota(admin_pb2.GetQuotaRequest(pool_id=POOL_ID, tenant=tenant))).usage


async def cached(rig: Rig, tokens: list[int], **fields: Any) -> int:
    """Returns how many leading tokens a prompt would find, and leaves nothing behind."""
    sequence = await rig.admit([*tokens, 1], skip_cache_write=True, **fields)
    await sequence.close()
    return sequence.admission.cached_token_count


async def test_row_77_a_strangers_long_prompt_does_not_evict_a_retained_system_prompt(large: Rig) -> None:
    """Otherwise one long document makes every request of everybody else compute its system prompt again."""
    await allow(large, "", 64)
    await large.run(SYSTEM, retention_priority=80)
    for seed in (8, 9):
        await large.run(prompt(600, seed), tenant=f"other-{seed}")
    await large.run(prompt(1024, 5), tenant="stranger")
    assert await cached(large, SYSTEM) == 1024


async def test_row_77_without_retention_the_same_prompt_is_evicted(large: Rig) -> None:
    """Otherwise the test above would prove nothing."""
    await large.run(SYSTEM)
    for seed in (8, 9):
        await large.run(prompt(600, seed), tenant=f"other-{seed}")
    await large.run(prompt(1024, 5), tenant="stranger")
    assert await cached(large, SYSTEM) == 0


async def test_row_77_what_is_retained_yields_when_nothing_else_is_left(large: Rig) -> None:
    """Otherwise retained blocks nobody uses stop a service that has memory."""
    await allow(large, "", 64)
    await large.run(SYSTEM, retention_priority=100)
    running = await large.admit(prompt(100 * 16, 9), tenant="stranger")
    assert (await usage(large)).retained_block_count == 28
    await running.close()
    # The tail went before the head, so that what is left can be matched.
    assert await cached(large, SYSTEM) == 28 * 16


async def test_row_77_retention_is_bounded_by_the_tenants_quota_the_beginning_first(large: Rig) -> None:
    """Otherwise whoever retains everything has the pool to himself."""
    await allow(large, "a", 10)
    await large.run(prompt(320), tenant="a", retention_priority=100)
    assert (await usage(large, "a")).retained_block_count == 10
    await large.run(prompt(118 * 16, 9), tenant="stranger")
    assert await cached(large, prompt(320), tenant="a") == 160
    # Without a quota, a quarter of the pool.
    await large.run(prompt(600, 3), tenant="b", retention_priority=100)
    assert (await usage(large, "b")).retained_block_count == 32
    await allow(large, "c", 0)
    await large.run(prompt(64, 4), tenant="c", session_id="s")
    assert (await usage(large, "c")).retained_block_count == 0


async def test_row_77_what_is_worth_least_goes_first(large: Rig) -> None:
    """Otherwise a priority says nothing."""
    for seed, priority in ((1, 90), (2, 20), (3, 60)):
        await large.run(prompt(160, seed), retention_priority=priority)
    await large.run(prompt(160, 4))
    full = await large.admit(prompt((128 - 15) * 16, 9), tenant="stranger")
    await full.close()
    assert await cached(large, prompt(160, 4)) == 0
    assert await cached(large, prompt(160, 2)) == 0
    assert await cached(large, prompt(160, 3)) == 80
    assert await cached(large, prompt(160, 1)) == 160


async def test_a_conversation_finds_its_blocks_between_its_turns(large: Rig) -> None:
    """Otherwise every turn of a conversation on a busy server computes all turns before it."""
    turn = await large.admit(prompt(100), session_id="chat", max_new_tokens=30)
    await turn.write()
    await turn.extend(prompt(30, 2))
    await turn.close()
    await large.run(prompt(1920, 9), tenant="stranger")
    history = [*prompt(100), *prompt(30, 2)]
    again = await large.admit([*history, *prompt(20, 3)], session_id="chat")
    assert again.admission.cached_token_count == 128
    await again.write()
    await again.close()
    await large.run(prompt(1872, 8), tenant="stranger")
    assert await cached(large, [*history, *prompt(20, 3)]) == 150


async def test_a_failed_sequence_retains_nothing(large: Rig) -> None:
    """What failed is nobody's conversation."""
    failed = await large.admit(prompt(64), session_id="chat")
    await failed.write()
    await large.journal(closed=[failed.table], close_reasons=[4])
    assert (await usage(large)).retained_block_count == 0


async def test_a_prompt_retained_twice_counts_once_and_the_stronger_wish_stays(large: Rig) -> None:
    """Otherwise a popular system prompt uses up its tenant's quota, or a casual request weakens it."""
    await large.run(prompt(160), retention_priority=90)
    await large.run([*prompt(160), 5], retention_priority=10)
    await large.run([*prompt(160), 6])
    assert (await usage(large)).retained_block_count == 11
    await large.run(prompt(160, 2), retention_priority=50)
    full = await large.admit(prompt(117 * 16, 9), tenant="stranger")
    await full.close()
    assert await cached(large, prompt(160)) == 160


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"retention_priority": 101}, "retention_priority: found 101, allowed are 0 .. 100"),
        ({"retention_priority": 1, "retention_ttl_seconds": 2**19 + 1}, "retention_ttl_seconds: found 524289"),
        ({"retention_ttl_seconds": 5}, "retention_ttl_seconds: is given without"),
        ({"session_id": "x" * 513}, "session_id: 513 characters"),
    ],
)
async def test_an_impossible_retention_is_refused(rig: Rig, fields: dict[str, Any], message: str) -> None:
    """Otherwise a typing error retains for ever, or not at all."""
    before = rig.state()
    with pytest.raises(InvalidRequestError, match=message):
        await rig.admit(prompt(20), **fields)
    assert rig.state() == before
