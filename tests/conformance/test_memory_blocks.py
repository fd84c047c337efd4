"""Rows 1 to 8, 15 to 24, 32, 69 and 79 of the behaviour of memory: blocks and their order."""

from __future__ import annotations

from typing import Any

import pytest

from protos.memsvc.v1 import admin_pb2
from quire.errors import BlockPoolExhaustedError, PromptTooLongError
from quire.memory import CloseReason
from tests.conformance.memory_connections import prompt, spec
from tests.conformance.memory_rig import Rig


async def test_row_01_an_admission_to_an_empty_pool_names_the_shortage_and_changes_nothing(rig: Rig) -> None:
    """Otherwise a gateway cannot tell how much it must preempt, or loses blocks by asking."""
    await rig.admit(prompt(30 * 16))
    before = rig.state()
    with pytest.raises(BlockPoolExhaustedError) as caught:
        await rig.admit(prompt(3 * 16, seed=1))
    assert caught.value.metadata["needed_block_count"] == "3"
    assert caught.value.metadata["available_block_count"] == "2"
    assert rig.state() == before


async def test_row_02_taking_blocks_lowers_the_free_count_by_exactly_as_many(rig: Rig) -> None:
    """Otherwise the pool loses blocks, or grants one twice."""
    before = (await rig.pool()).free_block_count
    sequence = await rig.admit(prompt(5 * 16 + 1))
    assert len(set(sequence.blocks)) == 6
    assert 0 not in sequence.blocks
    assert (await rig.pool()).free_block_count == before - 6


async def test_row_03_a_fresh_pool_hands_out_ascending_ids(rig: Rig) -> None:
    """Otherwise two runs of the same requests differ."""
    first = await rig.admit(prompt(40))
    second = await rig.admit(prompt(20, seed=1))
    assert first.blocks + second.blocks + await rig.lease(2) == [1, 2, 3, 4, 5, 6, 7]


async def test_row_04_a_block_leaves_the_middle_of_the_order_and_the_rest_keeps_it(rig: Rig) -> None:
    """Otherwise a hit changes what is evicted next."""
    for seed in range(4):
        await rig.run(prompt(16, seed))
    cached = [block for block in rig.free_order() if block <= 4]
    assert cached == [1, 2, 3, 4]
    hit = await rig.admit([*prompt(16, 1), 5])
    assert hit.blocks[0] == 2
    assert [block for block in rig.free_order() if block <= 4] == [1, 3, 4]


async def test_row_05_returned_blocks_keep_their_given_order_and_none_is_a_no_op(rig: Rig) -> None:
    """Otherwise runs are not repeatable."""
    blocks = await rig.lease(3)
    before = rig.free_order()
    await rig.journal(returned=[])
    assert rig.free_order() == before
    await rig.journal(returned=[blocks[1], blocks[0], blocks[2]])
    assert rig.free_order() == [*before, blocks[1], blocks[0], blocks[2]]


async def test_row_06_blank_blocks_are_reused_before_any_cached_one(rig: Rig) -> None:
    """Otherwise content that a prompt could match is thrown away for nothing."""
    await rig.run(prompt(64))
    unwritten = await rig.admit(prompt(64, seed=1))
    await unwritten.close(CloseReason.CANCELLED)
    big = await rig.admit(prompt(28 * 16, seed=2))
    assert not set(big.blocks) & {1, 2, 3, 4}
    assert (await rig.pool()).cached_block_count == 4


async def test_rows_07_and_08_the_least_recently_released_goes_first_and_the_tail_before_the_head(rig: Rig) -> None:
    """Otherwise hot prefixes are evicted, or their heads, which makes the rest useless."""
    first = await rig.run(prompt(3 * 16))
    second = await rig.run(prompt(3 * 16, seed=1))
    expected = first.blocks[::-1] + second.blocks[::-1]
    assert [block for block in rig.free_order() if block in expected] == expected
    taken = await rig.lease(26 + 4)
    assert taken[26:] == expected[:4]


async def test_row_16_blocks_that_the_request_hits_do_not_count_as_room(rig: Rig) -> None:
    """Otherwise the request is admitted and then evicts its own prefix."""
    await rig.run(prompt(8 * 16))
    await rig.admit(prompt(20 * 16, seed=1))
    before = rig.state()
    with pytest.raises(BlockPoolExhaustedError) as caught:
        await rig.admit(prompt(8 * 16) + prompt(5 * 16, seed=2))
    assert caught.value.metadata["available_block_count"] == "4"
    assert rig.state() == before


async def test_row_15_a_hit_that_does_not_fit_changes_no_reference_and_no_order(rig: Rig) -> None:
    """Otherwise a refused request pins blocks, or makes others be evicted in its place."""
    running = await rig.admit(prompt(4 * 16))
    await running.write()
    await rig.run(prompt(4 * 16) + prompt(4 * 16, seed=3))
    await rig.lease(6)
    before = rig.state()
    with pytest.raises(BlockPoolExhaustedError):
        await rig.admit(prompt(4 * 16) + prompt(27 * 16, seed=2))
    assert rig.state() == before


async def test_row_17_a_request_never_evicts_its_own_hits(rig: Rig) -> None:
    """Otherwise the executor reads content that was just overwritten."""
    hot = await rig.run(prompt(4 * 16))
    other = await rig.run(prompt(28 * 16, seed=1))
    assert set(other.blocks).isdisjoint(hot.blocks)
    full = await rig.admit(prompt(4 * 16) + prompt(28 * 16, seed=2))
    assert full.blocks[:4] == hot.blocks
    assert len(set(full.blocks)) == 32


async def test_row_18_a_block_with_new_content_no_longer_matches_the_old(rig: Rig) -> None:
    """Otherwise a prompt reads another prompt's keys and values."""
    await rig.run(prompt(4 * 16))
    big = await rig.admit(prompt(32 * 16, seed=1))
    await big.close(CloseReason.CANCELLED)
    again = await rig.admit(prompt(4 * 16 + 1))
    assert again.admission.cached_token_count == 0


async def test_row_21_decode_fills_the_open_block_and_then_takes_exactly_one(rig: Rig) -> None:
    """Otherwise memory is taken before it is needed."""
    sequence = await rig.admit(prompt(10))
    await sequence.extend(range(6))
    assert len(sequence.blocks) == 1
    await sequence.extend([99])
    assert len(sequence.blocks) == 2
    assert (await rig.pool()).used_block_count == 2


async def test_row_22_a_block_filled_by_decode_is_matched_by_a_later_prompt(rig: Rig) -> None:
    """Otherwise the second turn of a conversation computes the first answer again."""
    sequence = await rig.admit(prompt(20))
    await sequence.extend(range(500, 530))
    await sequence.close()
    again = await rig.admit([*sequence.tokens, 7])
    assert again.blocks[:3] == sequence.blocks[:3]
    assert again.admission.cached_token_count >= 48


async def test_row_23_tokens_that_are_not_written_are_never_matched(rig: Rig) -> None:
    """Otherwise a draft that was thrown away is served as a prefix."""
    sequence = await rig.admit(prompt(16))
    await sequence.extend(range(500, 520), written=20)
    other = await rig.admit([*sequence.tokens, 7])
    assert other.admission.cached_token_count == 16
    await sequence.close()
    later = await rig.admit([*sequence.tokens, 7])
    assert later.admission.cached_token_count == 20


async def test_row_24_blocks_reserved_ahead_are_used_before_any_other_is_taken(rig: Rig) -> None:
    """Otherwise a sequence that drafts takes the same room twice."""
    sequence = await rig.admit(prompt(10))
    ahead = await rig.lease(2)
    appended = [value for index, block in enumerate(ahead, 1) for value in (sequence.table, index, block)]
    await rig.journal(appended=appended)
    sequence.blocks += ahead
    assert (await rig.pool()).used_block_count == 3
    await sequence.extend(range(500, 538))
    assert (await rig.pool()).used_block_count == 3
    assert sequence.blocks[1:] == ahead
    assert [len((await rig.block(block)).identity) for block in ahead] == [16, 16]
    await sequence.close()
    assert (await rig.pool()).used_block_count == 0


async def test_row_32_when_all_have_finished_everything_is_free_or_cached(rig: Rig) -> None:
    """Otherwise the service leaks, and dies of it after days."""
    sequences = [await rig.admit(prompt(20 + seed, seed)) for seed in range(6)]
    for sequence in sequences:
        await sequence.extend(range(30))
        await sequence.close()
    leased = rig.core.pool("executor-0").memory
    pool = await rig.pool()
    assert pool.free_block_count + pool.cached_block_count == 32
    assert pool.used_token_count == 0
    assert pool.sequence_count == 0
    assert leased.tables.open_count == 0
    assert (await rig.admin.ListSequences(admin_pb2.ListSequencesRequest())).sequences == []


async def test_row_69_a_prompt_that_can_never_fit_is_refused_with_both_numbers(open_rig: Any) -> None:
    """Otherwise it waits forever, and everything behind it."""
    async with open_rig(spec(usable=4, max_model_len=1000)) as rig:
        with pytest.raises(PromptTooLongError, match=r"65 tokens need 5 blocks, the whole pool has 4") as caught:
            await rig.admit(prompt(65))
        assert caught.value.metadata["needed_block_count"] == "5"
        assert caught.value.metadata["usable_block_count"] == "4"
        with pytest.raises(PromptTooLongError, match="1001 tokens, the longest sequence here is 1000"):
            await rig.admit(prompt(1001))
        assert (await rig.admit(prompt(64))).blocks == [1, 2, 3, 4]


async def test_row_79_the_states_of_the_blocks_add_up_in_every_mixture(rig: Rig) -> None:
    """Otherwise an operator cannot see where the memory is."""
    await rig.run(prompt(40))
    running = await rig.admit(prompt(40, seed=1))
    await running.write(30)
    await rig.lease(3)
    pool = await rig.pool()
    assert (pool.used_block_count, pool.cached_block_count, pool.leased_block_count) == (3, 3, 3)
    assert pool.free_block_count == 23
    assert pool.used_token_count == 30
    assert pool.used_slot_utilization == pytest.approx(30 / 48)
    assert pool.utilization == pytest.approx(30 / 512)
