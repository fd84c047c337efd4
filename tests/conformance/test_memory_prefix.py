"""Rows 9 to 14, 19, 25 to 29, 56, 57, 61, 63, 65, 73, 75 and 76 of the behaviour of memory: the prefix cache."""

from __future__ import annotations

import subprocess
import sys

import pytest

from protos.memsvc.v1 import admin_pb2
from quire import hashing
from quire.memory import CloseReason
from tests.conformance.memory_connections import pack, prompt, spec
from tests.conformance.memory_rig import Rig, local_rig


async def test_row_09_full_blocks_get_an_identity_and_the_remainder_none(rig: Rig) -> None:
    """Otherwise a half-filled block is matched as if it were full."""
    sequence = await rig.admit(prompt(40))
    await sequence.write()
    identities = [(await rig.block(block)).identity for block in sequence.blocks]
    assert [len(identity) for identity in identities] == [16, 16, 0]


async def test_row_10_the_same_tokens_after_another_prefix_do_not_match(rig: Rig) -> None:
    """Otherwise keys and values of another context are read."""
    await rig.run(prompt(16) + prompt(16, seed=5))
    other = await rig.admit([*prompt(16, seed=1), *prompt(16, seed=5), 1])
    assert other.admission.cached_token_count == 0


async def test_row_11_a_running_sequence_shares_its_written_blocks(rig: Rig) -> None:
    """Otherwise a shared system prompt is held once for every request."""
    first = await rig.admit([*prompt(32), 1, 2])
    await first.write()
    second = await rig.admit([*prompt(32), 800, 801])
    assert second.blocks[:2] == first.blocks[:2]
    assert second.blocks[2] not in first.blocks
    assert second.admission.cached_token_count == 32
    assert [(await rig.block(block)).ref_count for block in second.blocks] == [2, 2, 1]


async def test_row_12_a_finished_sequence_leaves_its_blocks_to_be_found(rig: Rig) -> None:
    """Otherwise the next turn of a conversation starts from nothing."""
    first = await rig.run([*prompt(32), 1, 2])
    second = await rig.admit([*prompt(32), 800, 801])
    assert second.blocks[:2] == first.blocks[:2]
    assert (await rig.block(first.blocks[0])).ref_count == 1
    assert not set(rig.free_order()) & set(first.blocks[:2])


@pytest.mark.parametrize("length", [16, 17, 31, 32, 40, 48])
async def test_row_13_a_fully_cached_prompt_computes_exactly_one_token(rig: Rig, length: int) -> None:
    """Otherwise a repeated prompt computes up to a whole block again."""
    await rig.run(prompt(length))
    again = await rig.admit(prompt(length))
    assert again.admission.cached_token_count == length - 1
    (copy,) = again.admission.copies or [None]
    if (length - 1) % 16:
        assert copy is not None
        assert copy[1] == again.blocks[-1]
    await again.write()
    await again.close()


async def test_row_14_a_hit_ends_at_the_first_missing_block(rig: Rig) -> None:
    """Otherwise the sequence reads a block that nobody filled."""
    sequence = await rig.run(prompt(4 * 16))
    # The tail is evicted first: two blocks are left.
    leased = await rig.lease(28 + 2)
    await rig.journal(returned=leased)
    again = await rig.admit([*prompt(4 * 16), 1])
    assert again.admission.cached_token_count == 32
    assert again.blocks[:2] == sequence.blocks[:2]


async def test_rows_19_and_73_equal_content_committed_twice_is_published_once(rig: Rig) -> None:
    """Otherwise one prompt fills the cache many times over, or evicting one copy loses the content."""
    first = await rig.admit(prompt(33))
    second = await rig.admit(prompt(33))
    await first.write()
    await second.write()
    assert [len((await rig.block(block)).identity) for block in first.blocks[:2]] == [16, 16]
    assert [len((await rig.block(block)).identity) for block in second.blocks[:2]] == [0, 0]
    await second.close()
    await first.close()
    assert (await rig.pool()).cached_block_count == 3
    third = await rig.admit([*prompt(33), 9])
    assert third.blocks[:2] == first.blocks[:2]


async def test_rows_19_and_73_the_live_block_replaces_an_equal_one_that_nobody_uses(rig: Rig) -> None:
    """Otherwise the content is lost when the older copy is evicted, although a newer one is there."""
    first = await rig.admit(prompt(33))
    second = await rig.admit(prompt(33))
    await first.write()
    await first.close()
    await second.write()
    assert [len((await rig.block(block)).identity) for block in second.blocks[:2]] == [16, 16]
    await rig.lease(28)
    third = await rig.admit([*prompt(32)], skip_cache_write=True)
    assert third.blocks[0] == second.blocks[0]


async def test_row_19_a_block_that_was_offered_to_an_equal_one_is_not_evicted_before_that_ends(rig: Rig) -> None:
    """Otherwise the content is lost although a copy of it exists, or a table comes to name a block of other content."""
    first = await rig.admit(prompt(33))
    second = await rig.admit(prompt(33))
    await first.write()
    await second.write()
    await first.close()
    leased = await rig.lease(29)
    assert not set(first.blocks[:2]) & set(leased)
    await second.close()
    await rig.journal(returned=leased)
    third = await rig.admit([*prompt(33), 9])
    assert third.blocks[:2] == first.blocks[:2]


async def test_row_25_without_reading_or_writing_the_cache_nothing_matches_and_nothing_is_counted(rig: Rig) -> None:
    """Otherwise turning the cache off does not turn it off."""
    for _ in range(3):
        sequence = await rig.run(prompt(48), skip_cache_read=True, skip_cache_write=True)
        assert sequence.admission.cached_token_count == 0
    pool = await rig.pool()
    assert (pool.cached_block_count, pool.free_block_count, pool.prefix_query_token_count) == (0, 32, 0)


async def test_row_63_a_request_that_does_not_read_the_cache_still_fills_it(rig: Rig) -> None:
    """Otherwise requests for prompt logprobs waste what they compute."""
    first = await rig.run(prompt(48), skip_cache_read=True)
    again = await rig.run(prompt(48), skip_cache_read=True)
    assert again.admission.cached_token_count == 0
    hit = await rig.admit([*prompt(48), 1])
    assert hit.admission.cached_token_count == 48
    assert hit.blocks[:3] in (first.blocks, again.blocks)


@pytest.mark.parametrize("field", ["cache_salt", "adapter", "tenant"])
async def test_rows_26_27_and_75_other_salts_adapters_and_tenants_never_share(rig: Rig, field: str) -> None:
    """Otherwise one user reads, or times, what another one asked."""
    await rig.run(prompt(48), **{field: "a"})
    assert (await rig.run(prompt(49), **{field: "b"})).admission.cached_token_count == 0
    assert (await rig.run(prompt(49))).admission.cached_token_count == 0
    assert (await rig.run(prompt(49), **{field: "a"})).admission.cached_token_count == 48


async def test_row_75_a_client_that_knows_the_salt_of_another_tenant_still_shares_nothing(rig: Rig) -> None:
    """Otherwise the separation of tenants is the client's to give away."""
    await rig.run(prompt(48), tenant="a", cache_salt="s")
    assert (await rig.run(prompt(49), tenant="b", cache_salt="s")).admission.cached_token_count == 0


def test_row_29_identities_are_equal_in_every_process() -> None:
    """Otherwise a replica cannot find what another one computed."""
    program = (
        "from quire import hashing; root = hashing.PrefixRoot('m', 16, 'float32', '', b's' * 16, '').digest(); "
        "print(hashing.chain(root, bytes(range(128)), 16)[-1].hex())"
    )
    outputs = {
        subprocess.run(  # the interpreter that runs the tests
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    root = hashing.PrefixRoot("m", 16, "float32", "", b"s" * 16, "").digest()
    assert outputs == {hashing.chain(root, bytes(range(128)), 16)[-1].hex() + "\n"}


async def test_row_56_the_source_of_a_copy_is_held_until_the_copy_ran(rig: Rig) -> None:
    """Otherwise the source is overwritten before it is copied."""
    first = await rig.run(prompt(40))
    again = await rig.admit(prompt(40))
    assert again.admission.copies == [(first.blocks[2], again.blocks[2])]
    source = await rig.block(first.blocks[2])
    assert source.state == admin_pb2.BLOCK_STATE_USED
    assert source.ref_count == 0
    assert "source of 1 copies" in source.explanation
    await again.write(39)
    assert (await rig.block(first.blocks[2])).state == admin_pb2.BLOCK_STATE_USED
    await again.write(40)
    assert (await rig.block(first.blocks[2])).state == admin_pb2.BLOCK_STATE_CACHED


async def test_row_57_the_target_of_a_copy_is_not_matchable_until_it_is_written(rig: Rig) -> None:
    """Otherwise a prompt reads a copy that was never made."""
    await rig.run(prompt(40))
    again = await rig.admit([*prompt(40), 7])
    target = again.blocks[2]
    assert again.admission.copies[0][1] == target
    await again.close(CloseReason.CANCELLED)
    block = await rig.block(target)
    assert block.state == admin_pb2.BLOCK_STATE_FREE


async def test_row_58_a_block_that_has_filled_is_found_as_a_full_one_and_not_by_its_head(rig: Rig) -> None:
    """Otherwise every turn of a conversation copies a block that it could share."""
    first = await rig.run(prompt(24))
    second = await rig.admit(prompt(32))
    assert second.admission.copies == [(first.blocks[1], second.blocks[1])]
    await second.write()
    third = await rig.admit([*prompt(32), 7])
    assert third.blocks[:2] == second.blocks[:2]
    assert third.admission.cached_token_count == 32
    assert third.admission.copies == []


async def test_a_prompt_that_leaves_a_cached_block_in_its_middle_copies_what_is_equal(rig: Rig) -> None:
    """Otherwise two prompts with a common beginning compute the common part of a block twice."""
    first = await rig.run(prompt(32))
    other = await rig.admit([*prompt(24), *prompt(20, seed=3)])
    assert other.blocks[0] == first.blocks[0]
    assert other.admission.cached_token_count == 24
    assert other.admission.copies == [(first.blocks[1], other.blocks[1])]


async def test_row_61_hits_are_counted_once_for_each_admitted_request(rig: Rig) -> None:
    """Otherwise a waiting queue or a preemption makes the hit rate say anything."""
    await rig.run(prompt(48))
    await rig.lease(28)
    with pytest.raises(Exception, match="blocks are needed"):
        await rig.admit(prompt(48) + prompt(64, seed=1))
    sequence = await rig.admit([*prompt(48), 1])
    await sequence.close(CloseReason.PREEMPTED)
    await rig.admit([*prompt(48), 1], resumed=True)
    pool = await rig.pool()
    assert (pool.prefix_query_token_count, pool.prefix_hit_token_count) == (97, 48)
    assert pool.preemption_count == 1


async def test_row_65_nothing_is_matchable_before_the_executor_has_confirmed_it(rig: Rig) -> None:
    """Otherwise an aborted step serves garbage to the next prompt."""
    first = await rig.admit(prompt(48))
    assert (await rig.admit([*prompt(48), 1])).admission.cached_token_count == 0
    await first.write(17)
    third = await rig.admit([*prompt(48), 2])
    assert third.admission.cached_token_count == 16
    await first.close(CloseReason.FAILED)
    fourth = await rig.admit([*prompt(48), 3])
    assert fourth.admission.cached_token_count == 16


async def test_row_40_a_preempted_sequence_finds_again_what_survived(rig: Rig) -> None:
    """Otherwise a preemption costs the whole prompt."""
    sequence = await rig.admit(prompt(60))
    await sequence.extend(range(900, 910))
    await sequence.close(CloseReason.PREEMPTED)
    back = await rig.admit(sequence.tokens, resumed=True)
    assert back.admission.cached_token_count == 69


async def test_who_was_swapped_out_finds_what_survived_and_is_counted_apart(rig: Rig) -> None:
    """An operator must see which preemptions cost a transfer and which a computation."""
    sequence = await rig.admit(prompt(60))
    await sequence.extend(range(900, 910))
    await sequence.close(CloseReason.SWAPPED)
    other = await rig.admit(prompt(20, seed=4))
    await other.close(CloseReason.PREEMPTED)
    back = await rig.admit(sequence.tokens, resumed=True, swapped_token_count=69)
    assert back.admission.cached_token_count == 69
    pool = await rig.pool()
    assert (pool.preemption_count, pool.swap_count) == (2, 1)


async def test_what_a_swapped_sequence_gave_up_is_not_kept_for_it(rig: Rig) -> None:
    """It is in host memory: who keeps blocks for it as well evicts what others would find."""
    swapped, kept = await rig.run(prompt(32, seed=1)), await rig.admit(prompt(32, seed=2))
    await kept.write()
    await kept.close(CloseReason.SWAPPED)
    awaited = await rig.admit(prompt(32, seed=3))
    await awaited.write()
    await awaited.close(CloseReason.PREEMPTED)
    order = rig.free_order()[-6:]
    assert order == [*swapped.blocks[::-1], *kept.blocks[::-1], *awaited.blocks[::-1]]


async def test_more_tokens_than_there_are_cannot_have_been_swapped_out(rig: Rig) -> None:
    """The last token has always to be computed; a figure beyond it is a gateway's mistake."""
    with pytest.raises(Exception, match=r"swapped_token_count: found 20, allowed are 0 .. 19"):
        await rig.admit(prompt(20), swapped_token_count=20)


async def test_row_76_equal_digests_of_other_tokens_are_a_miss_and_are_counted() -> None:
    """Otherwise whoever finds a collision reads other users' prompts."""

    def colliding(_parent: bytes, tokens: bytes | memoryview, block_size: int) -> list[bytes]:
        return [b"\1" * 16] * (len(tokens) // (4 * block_size))

    async with local_rig(spec(), chain=colliding) as rig:
        first = await rig.admit(prompt(33))
        await first.write(16)
        other = await rig.admit([*prompt(16, seed=1), 1])
        assert other.admission.cached_token_count == 0
        await other.write()
        memory = rig.core.pool("executor-0").memory
        assert memory.prefix.collision_count == 2
        assert (await rig.admit([*prompt(16), 5])).admission.cached_token_count == 16


def test_the_salt_of_a_tenant_depends_on_the_secret_of_the_server() -> None:
    """Otherwise anyone can compute another tenant's identities."""
    assert hashing.tenant_salt(b"a" * 16, "t") != hashing.tenant_salt(b"b" * 16, "t")
    assert hashing.tenant_salt(b"a" * 16, "t") != hashing.tenant_salt(b"a" * 16, "u")
    assert pack([1, 256]) == b"\1\0\0\0\0\1\0\0"
