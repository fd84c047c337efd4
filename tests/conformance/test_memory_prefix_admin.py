"""What operators see of blocks and prefixes, and what they do to them: lists, explanations, pins, evictions, leaks."""

from __future__ import annotations

import dataclasses
from typing import Any

from google.protobuf import duration_pb2
import pytest

from protos.memsvc.v1 import admin_pb2
from quire.errors import InvalidRequestError, PinQuotaError, PoolNotFoundError, PrefixNotFoundError
from tests.conformance.conftest import OpenRig
from tests.conformance.memory_connections import POOL_ID, pack, prompt, spec
from tests.conformance.memory_rig import Rig


async def explain(rig: Rig, tokens: list[int], **fields: Any) -> Any:
    """Asks why a prompt is not cached any further; nothing may change by that."""
    before = rig.state()
    request = admin_pb2.ExplainPrefixRequest(pool_id=POOL_ID, token_ids=pack(tokens), **fields)
    answer = await rig.admin.ExplainPrefix(request)
    assert rig.state() == before
    assert answer.token_count == len(tokens)
    return answer


def selector(tokens: list[int], **fields: Any) -> Any:
    """Returns a selector of a prefix."""
    return admin_pb2.PrefixSelector(token_ids=pack(tokens), **fields)


async def allow(rig: Rig, tenant: str, **quota: int) -> None:
    """Sets a quota."""
    message = admin_pb2.Quota(**{f"{name}_block_count": value for name, value in quota.items()})
    await rig.admin.SetQuota(admin_pb2.SetQuotaRequest(pool_id=POOL_ID, tenant=tenant, quota=message))


async def pin(rig: Rig, tokens: list[int], **fields: Any) -> int:
    """Pins a prefix."""
    request = admin_pb2.PinPrefixRequest(pool_id=POOL_ID, prefix=selector(tokens, **fields))
    try:
        return int((await rig.admin.PinPrefix(request)).block_count)
    finally:
        rig.check()


async def evict(rig: Rig, prefix: Any) -> tuple[int, int]:
    """Evicts a prefix."""
    answer = await rig.admin.EvictPrefix(admin_pb2.EvictPrefixRequest(pool_id=POOL_ID, prefix=prefix))
    rig.check()
    return answer.block_count, answer.kept_block_count


async def test_every_reason_for_a_miss_is_told_from_the_others(rig: Rig) -> None:
    """Otherwise nobody knows whether to salt less, wait, or buy memory."""
    await rig.run(prompt(64), tenant="t")
    whole = await explain(rig, prompt(64), tenant="t")
    assert (whole.reason, whole.cached_token_count) == (admin_pb2.MISS_REASON_NONE, 64)
    short = await explain(rig, [*prompt(64), 1, 2], tenant="t")
    assert (short.reason, short.cached_token_count, short.block_index) == (admin_pb2.MISS_REASON_TOO_SHORT, 64, 4)
    for fields in ({"cache_salt": "s"}, {"adapter": "a"}):
        other = await explain(rig, prompt(64), tenant="t", **fields)
        assert (other.reason, other.cached_token_count) == (admin_pb2.MISS_REASON_OTHER_SCOPE, 0)
        assert other.block_id == 1
        assert "Block 1 of the same tenant has the same tokens" in other.explanation
    stranger = await explain(rig, prompt(64), tenant="u")
    assert (stranger.reason, stranger.cached_token_count, stranger.block_id) == (
        admin_pb2.MISS_REASON_OTHER_TENANT,
        0,
        0,
    )
    running = await rig.admit(prompt(32, 2), tenant="t")
    waiting = await explain(rig, prompt(32, 2), tenant="t")
    assert (waiting.reason, waiting.block_id) == (admin_pb2.MISS_REASON_NOT_COMMITTED, running.blocks[0])
    unknown = await explain(rig, prompt(32, 3), tenant="t")
    assert unknown.reason == admin_pb2.MISS_REASON_NEVER_SEEN
    await running.close()
    blocks = await rig.lease(30)
    gone = await explain(rig, prompt(64), tenant="t")
    assert (gone.reason, gone.cached_token_count, gone.block_index) == (admin_pb2.MISS_REASON_EVICTED, 32, 2)
    assert gone.HasField("evicted_age")
    assert "evicted" in gone.explanation
    await rig.journal(returned=blocks)


async def test_nobody_can_feel_their_way_along_the_prompt_of_another_tenant(rig: Rig) -> None:
    """Otherwise whoever may ask guesses a prompt token by token, even one that must not be cached."""
    running = await rig.admit(prompt(40, 1), tenant="t")
    hidden = await rig.admit(prompt(40, 2), tenant="t", skip_cache_write=True)
    await hidden.write()
    for seed, length in ((1, 1), (1, 8), (1, 16), (1, 32), (2, 8), (2, 16), (2, 32)):
        found = await explain(rig, prompt(length, seed), tenant="u")
        expected = admin_pb2.MISS_REASON_NEVER_SEEN if length >= 16 else admin_pb2.MISS_REASON_TOO_SHORT
        assert (found.reason, found.block_id) == (expected, 0)
    await running.close()
    await hidden.close()


async def test_blocks_are_listed_by_state_tenant_and_prefix_page_by_page(rig: Rig) -> None:
    """Otherwise an operator looks at blocks one by one."""
    await rig.run(prompt(64), tenant="a")
    running = await rig.admit([*prompt(48, 1), 1], tenant="b")
    await running.write()

    async def listed(**fields: Any) -> list[Any]:
        found, token = [], ""
        while True:
            request = admin_pb2.ListBlocksRequest(pool_id=POOL_ID, page_size=3, page_token=token, **fields)
            page = await rig.admin.ListBlocks(request)
            found += page.blocks
            token = page.next_page_token
            if not token:
                return found

    assert [one.block_id for one in await listed()] == list(range(33))
    assert [one.block_id for one in await listed(state=admin_pb2.BLOCK_STATE_USED)] == running.blocks
    assert [one.block_id for one in await listed(tenant="a")] == [1, 2, 3, 4]
    assert [one.block_id for one in await listed(tenant="b", state=admin_pb2.BLOCK_STATE_CACHED)] == []
    third = (await listed(tenant="a"))[2]
    assert [one.block_id for one in await listed(identity=third.identity)] == [1, 2, 3]
    assert (third.ref_count, third.generation, len(third.identity)) == (0, 1, 16)
    with pytest.raises(InvalidRequestError, match="state: found 99, allowed are 1"):
        await listed(state=99)
    with pytest.raises(InvalidRequestError, match="identity: 3 bytes, expected 16"):
        await listed(identity=b"abc")
    with pytest.raises(InvalidRequestError, match="page_token"):
        await rig.admin.ListBlocks(admin_pb2.ListBlocksRequest(pool_id=POOL_ID, page_token="x"))


async def test_shared_prefixes_are_listed_with_what_they_save(rig: Rig) -> None:
    """Otherwise nobody knows what sharing is worth, or what to pin."""
    system = prompt(64)
    first = await rig.admit([*system, *prompt(32, 1)])
    await first.write()
    for seed in (2, 3):
        await rig.admit([*system, *prompt(32, seed)])
    again = await rig.admit([*system, *prompt(32, 1), 5])
    found = (await rig.admin.ListPrefixes(admin_pb2.ListPrefixesRequest(pool_id=POOL_ID))).prefixes
    assert [(one.block_id, one.token_count, one.ref_count) for one in found] == [
        (first.blocks[3], 64, 4),
        (again.blocks[5], 96, 2),
    ]
    assert (found[0].bytes, found[0].saved_bytes) == (4096, 3 * 4096)
    page = await rig.admin.ListPrefixes(admin_pb2.ListPrefixesRequest(pool_id=POOL_ID, page_size=1, min_ref_count=1))
    rest = await rig.admin.ListPrefixes(
        admin_pb2.ListPrefixesRequest(pool_id=POOL_ID, min_ref_count=1, page_token=page.next_page_token)
    )
    assert [one.block_id for one in [*page.prefixes, *rest.prefixes]][:2] == [one.block_id for one in found]


async def test_a_pinned_prefix_stays_until_it_is_released(rig: Rig) -> None:
    """Otherwise a system prompt that must be fast is not."""
    await rig.run(prompt(70), tenant="a")
    with pytest.raises(PinQuotaError, match="4 blocks more would be pinned, of the tenant 0 are and 0 may be"):
        await pin(rig, prompt(70), tenant="a")
    await allow(rig, "a", pinned=4)
    assert await pin(rig, prompt(70), tenant="a") == 4
    assert await pin(rig, prompt(70), tenant="a") == 4
    full = await rig.admit(prompt(28 * 16, 1), tenant="b")
    await full.close()
    assert len(await rig.lease(32)) == 28
    listed = await rig.admin.ListBlocks(admin_pb2.ListBlocksRequest(pool_id=POOL_ID, tenant="a"))
    assert [one.pinned for one in listed.blocks] == [True] * 4
    assert await evict(rig, selector(prompt(70), tenant="a")) == (0, 4)
    request = admin_pb2.ReleasePrefixRequest(
        pool_id=POOL_ID, prefix=admin_pb2.PrefixSelector(identity=listed.blocks[3].identity)
    )
    assert (await rig.admin.ReleasePrefix(request)).block_count == 4
    assert (await rig.admin.ReleasePrefix(request)).block_count == 0
    assert len(await rig.lease(4)) == 4
    assert (await explain(rig, prompt(70), tenant="a")).reason == admin_pb2.MISS_REASON_EVICTED


async def release(rig: Rig, tokens: list[int], **fields: Any) -> int:
    """Releases a prefix."""
    request = admin_pb2.ReleasePrefixRequest(pool_id=POOL_ID, prefix=selector(tokens, **fields))
    try:
        return int((await rig.admin.ReleasePrefix(request)).block_count)
    finally:
        rig.check()


async def pinned(rig: Rig, tenant: str) -> int:
    """Returns how many blocks a tenant has pinned."""
    answer = await rig.admin.GetQuota(admin_pb2.GetQuotaRequest(pool_id=POOL_ID, tenant=tenant))
    return int(answer.usage.pinned_block_count)


async def test_a_pin_outlives_whoever_computes_the_same_text_again(rig: Rig) -> None:
    """Otherwise the first request that is exactly a pinned prompt, or does not read the cache, ends the pin unseen."""
    await allow(rig, "a", pinned=4)
    await rig.run(prompt(64), tenant="a")
    assert await pin(rig, prompt(64), tenant="a") == 4
    await rig.run(prompt(64), tenant="a")
    await rig.run(prompt(64), tenant="a", skip_cache_read=True)
    rig.check()
    assert await pinned(rig, "a") == 4
    # A quota that is lowered takes no pin away, and does not make it an error to pin again what is pinned.
    await allow(rig, "a", pinned=2)
    assert await pin(rig, prompt(64), tenant="a") == 4
    assert len(await rig.lease(32)) == 28
    assert (await explain(rig, prompt(64), tenant="a")).cached_token_count == 64
    assert await release(rig, prompt(64), tenant="a") == 4
    # Released blocks go the tail first, so that what is left can be matched.
    assert len(await rig.lease(2)) == 2
    assert (await explain(rig, prompt(64), tenant="a")).cached_token_count == 32


async def test_a_pin_is_of_its_tenant_and_salt_and_needs_what_it_begins_with(rig: Rig) -> None:
    """Otherwise a tenant's quota pays for another's text, or a pinned block stays and cannot be matched."""
    for tenant in ("a", "b"):
        await rig.run(prompt(64), tenant=tenant)
        await allow(rig, tenant, pinned=4)
    assert await pin(rig, prompt(64), tenant="a") == 4
    assert (await pinned(rig, "a"), await pinned(rig, "b")) == (4, 0)
    for fields in ({"tenant": "a", "cache_salt": "s"}, {"tenant": "c"}):
        with pytest.raises(PrefixNotFoundError):
            await pin(rig, prompt(64), **fields)
        with pytest.raises(PrefixNotFoundError):
            await release(rig, prompt(64), **fields)
        with pytest.raises(PrefixNotFoundError):
            await evict(rig, selector(prompt(64), **fields))
    assert await evict(rig, selector(prompt(64), tenant="b")) == (4, 0)
    assert (await explain(rig, prompt(64), tenant="a")).cached_token_count == 64
    assert await release(rig, prompt(32), tenant="a") == 0
    assert await pinned(rig, "a") == 4
    assert await release(rig, prompt(64), tenant="a") == 4
    assert await evict(rig, selector(prompt(64), tenant="a")) == (4, 0)


async def test_evicting_a_prefix_takes_what_continues_it_and_leaves_what_is_used(rig: Rig) -> None:
    """Otherwise a text that must go can still be found behind its beginning."""
    await rig.run([*prompt(32), *prompt(32, 1)])
    await rig.run([*prompt(32), *prompt(40, 2)])
    await rig.run(prompt(32, 7))
    running = await rig.admit([*prompt(32), *prompt(32, 1), 9])
    assert await evict(rig, selector(prompt(32))) == (3, 4)
    assert (await explain(rig, [*prompt(32), *prompt(32, 1)])).cached_token_count == 64
    gone = await explain(rig, [*prompt(32), *prompt(40, 2)])
    assert (gone.cached_token_count, gone.reason) == (32, admin_pb2.MISS_REASON_EVICTED)
    await running.close()
    assert await evict(rig, selector(prompt(32))) == (4, 0)
    with pytest.raises(PrefixNotFoundError, match="nothing of the prefix is cached"):
        await evict(rig, selector(prompt(32)))
    assert (await rig.pool()).cached_block_count == 2


async def test_evicting_a_text_leaves_what_others_begin_with(rig: Rig) -> None:
    """Otherwise one prompt that must go takes the system prompt, and everybody's conversations, along."""
    system = prompt(32)
    await rig.run([*system, *prompt(24, 1)])
    await rig.run([*system, *prompt(24, 2)])
    # Nothing of it is cached beyond the system prompt.
    assert await evict(rig, selector([*system, *prompt(24, 3)])) == (0, 2)
    # The block behind the system prompt and the head of the next one; of that head, those that begin so.
    assert await evict(rig, selector([*system, *prompt(20, 1)])) == (2, 2)
    assert (await explain(rig, [*system, *prompt(24, 1)])).cached_token_count == 32
    assert (await explain(rig, [*system, *prompt(24, 2)])).cached_token_count == 56
    other = [*prompt(24, 2)[:20], 7]
    assert await evict(rig, selector([*system, *other])) == (0, 3)
    assert await evict(rig, selector(prompt(5))) == (4, 0)
    assert (await rig.pool()).cached_block_count == 0


async def test_in_a_pool_with_a_window_what_a_hit_needs_is_pinned(open_rig: OpenRig) -> None:
    """Otherwise nothing can be pinned there, or more than the window is, or what is pinned cannot be matched."""
    async with open_rig(dataclasses.replace(spec(), sliding_window=40)) as rig:
        await allow(rig, "", pinned=3)
        sequence = await rig.admit([*prompt(96), 1])
        for end in range(16, 112, 16):
            while len(sequence.blocks) * 16 < end:
                (block,) = await rig.grow(rig.gateway, 1)
                await rig.journal(appended=[sequence.table, len(sequence.blocks), block])
                sequence.blocks.append(block)
            await sequence.write(end)
        await sequence.close()
        assert (await explain(rig, prompt(96))).cached_token_count == 96
        assert await pin(rig, prompt(96)) == 3
        assert len(await rig.lease(32)) == 29
        assert (await explain(rig, prompt(96))).cached_token_count == 96
        assert (await explain(rig, prompt(80))).cached_token_count < 80
        identity = next(one.identity for one in (await listed_pins(rig)) if one.identity)
        assert await evict(rig, admin_pb2.PrefixSelector(identity=identity)) == (0, 3)
        assert await release(rig, prompt(96)) == 3
        assert await evict(rig, selector(prompt(96))) == (3, 0)


async def listed_pins(rig: Rig) -> list[Any]:
    """Returns the pinned blocks."""
    blocks = (await rig.admin.ListBlocks(admin_pb2.ListBlocksRequest(pool_id=POOL_ID))).blocks
    return [one for one in blocks if one.pinned]


async def test_what_gateways_hold_is_listed_with_its_age_the_oldest_first(rig: Rig) -> None:
    """Otherwise memory that somebody forgot is found only by restarting everything."""
    await rig.admit(prompt(40), request_id="old", tenant="t")
    await rig.lease(3)
    found = (await rig.admin.FindLeaks(admin_pb2.FindLeaksRequest())).holdings
    assert {(one.sequence_id, one.tenant, one.block_count, one.closing) for one in found} == {
        ("old/0", "t", 3, False),
        ("", "", 3, False),
    }
    assert {one.gateway_id for one in found} == {"gateway-0"}
    old = admin_pb2.FindLeaksRequest(pool_id=POOL_ID, min_age=duration_pb2.Duration(seconds=3600))
    assert not (await rig.admin.FindLeaks(old)).holdings
    first = await rig.admin.FindLeaks(admin_pb2.FindLeaksRequest(page_size=1))
    rest = await rig.admin.FindLeaks(admin_pb2.FindLeaksRequest(page_token=first.next_page_token))
    assert len(first.holdings) == len(rest.holdings) == 1
    with pytest.raises(InvalidRequestError, match="min_age"):
        await rig.admin.FindLeaks(admin_pb2.FindLeaksRequest(min_age=duration_pb2.Duration(seconds=-1)))


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        (admin_pb2.PrefixSelector(), "token_ids: 0 bytes"),
        (admin_pb2.PrefixSelector(token_ids=b"abc"), "token_ids: 3 bytes"),
        (admin_pb2.PrefixSelector(identity=b"abc"), "identity: 3 bytes, expected 16"),
        (
            admin_pb2.PrefixSelector(identity=b"x" * 16, token_ids=b"abcd"),
            "token_ids: must be empty beside an identity",
        ),
        (admin_pb2.PrefixSelector(identity=b"x" * 16, tenant="a"), "tenant: must be empty beside an identity"),
        (admin_pb2.PrefixSelector(token_ids=bytes(4 * 100_000)), "token_ids: 100000 tokens, the longest sequence here"),
        (admin_pb2.PrefixSelector(token_ids=b"abcd", tenant="x" * 513), "tenant: 513 characters"),
    ],
)
async def test_a_selector_that_cannot_be_is_refused(rig: Rig, prefix: Any, message: str) -> None:
    """Otherwise a typing error pins or evicts something else."""
    for call, request in (
        (rig.admin.PinPrefix, admin_pb2.PinPrefixRequest),
        (rig.admin.ReleasePrefix, admin_pb2.ReleasePrefixRequest),
        (rig.admin.EvictPrefix, admin_pb2.EvictPrefixRequest),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            await call(request(pool_id=POOL_ID, prefix=prefix))
        with pytest.raises(PoolNotFoundError):
            await call(request(pool_id="x", prefix=prefix))
