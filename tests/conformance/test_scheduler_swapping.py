"""What becomes of a preempted sequence where there is host memory: the executor checks every slot that it reads."""

from __future__ import annotations

import pytest

from gateway.admission import admit_request
from gateway.core.precedence import SchedulingPolicy
from gateway.core.sequence import Sequence, SequenceState
from gateway.core.step import StepDraft
from gateway.core.swapping import PreemptionMode, SwapSettings
from tests.conformance.scheduler_rig import POOL_ID, SIZE, Rig

ALWAYS = SwapSettings(64, mode=PreemptionMode.SWAP)


def preempting_step(rig: Rig, victim: Sequence) -> StepDraft:
    """Takes turns until a sequence has given way; returns the step that removes it, which is in flight."""
    for _ in range(400):
        rig.admit()
        draft = rig.plan()
        if victim.table in draft.removed:
            return draft
        if rig.in_flight:
            rig.land()
        else:
            rig.scheduler.lease.exhausted = False
    raise AssertionError("nobody was preempted")


def pair(rig: Rig) -> tuple[Sequence, Sequence]:
    """Submits two sequences of which the second gives way in a pool of 6 blocks."""
    return rig.submit(2 * SIZE - 2, max_tokens=60), rig.submit(2 * SIZE - 6, max_tokens=50)


def short(depth: int = 1, swap: SwapSettings = ALWAYS, usable: int = 6) -> tuple[Rig, Sequence, Sequence]:
    """Returns a pool too small for its two sequences, the second of which has just given way."""
    rig = Rig(usable, depth=depth, swap=swap)
    first, second = pair(rig)
    assert rig.turns_until_preempted(first, second) == [second]
    return rig, first, second


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_who_comes_back_from_host_memory_computes_nothing_twice(depth: int) -> None:
    """With steps in flight that still write into its blocks when it gives way: all of that is moved, too."""
    rig, _, second = short(depth)
    rig.run()
    assert rig.output[second] == rig.expected(second)
    assert (second.swap_count, second.preemption_count, second.recomputed_token_count) == (1, 1, 0)
    assert rig.scheduler.swapping.stats.swap_count == 1
    statistics = rig.core.pool(POOL_ID).memory.statistics
    assert (statistics.preemption_count, statistics.swap_count) == (1, 1)


def test_what_steps_in_flight_write_into_a_victim_is_moved_with_it() -> None:
    """Under priorities a sequence gives way while it computes: what it is about to have must not be lost."""
    ahead = 0
    for length in range(1, 2 * SIZE):
        rig = Rig(6, depth=3, swap=ALWAYS, policy=SchedulingPolicy.PRIORITY)
        low = rig.submit(length, max_tokens=65, priority=5)
        high = rig.submit(2 * SIZE, max_tokens=60)
        assert rig.turns_until_preempted(low, high) == [low]
        ahead += -(-low.scheduled // SIZE) > -(-low.computed // SIZE)
        rig.run()
        assert rig.output[low] == rig.expected(low)
        assert low.recomputed_token_count == 0
    assert ahead, "no step in flight began a block"


def test_the_step_that_removes_a_victim_moves_its_blocks_which_return_with_its_fence() -> None:
    """Moved earlier they lack what is in flight; returned earlier they hold what somebody else writes."""
    rig = Rig(6, swap=ALWAYS)
    _, second = pair(rig)
    draft = preempting_step(rig, second)
    blocks, computed, used = list(second.blocks), second.scheduled, rig.used()
    assert draft.swap_out[::2] == blocks[: -(-computed // SIZE)]
    rig.land()
    assert rig.used() == used - len(blocks)
    assert second.swapped is not None
    assert second.swapped.token_count == computed


def test_what_is_moved_in_can_be_matched_when_the_step_is_acknowledged() -> None:
    """Published before, it would be read by others while it is still on its way."""
    rig, first, second = short()
    rig.cancel(first)
    rig.turn()
    evict(rig)
    rig.admit()
    assert second.state is SequenceState.RUNNING
    assert (second.cached_token_count, second.computed) == (0, 0) != second.scheduled
    # It ends before the step is planned: nothing is ever moved.
    rig.cancel(second)
    twin = rig.submit([*second.tokens[:-1], 7], max_tokens=5)
    rig.run()
    assert twin.cached_token_count == 0
    assert rig.output[twin] == rig.expected(twin)


def test_what_was_moved_in_is_told_though_nothing_is_computed_behind_it_yet() -> None:
    """A beam that is held can be forked only where the memory service knows it as written."""
    rig, first, second = short()
    rig.cancel(first)
    rig.turn()
    second.hold()
    second.total_limit = len(second.tokens)
    rig.admit()
    rig.turns(2)
    memory = rig.core.pool(POOL_ID).memory
    assert second.state is SequenceState.RUNNING
    assert memory.tables.written[memory.tables.slot(second.table)] == second.scheduled == len(second.tokens) - 1
    second.resume()
    rig.run()
    assert rig.output[second] == rig.expected(second)


def evict(rig: Rig) -> None:
    """Has everything that is cached make way for other content."""
    while rig.in_flight:
        rig.land()
    blocks = rig.take(rig.available())
    rig.give_back(blocks)


def test_what_is_still_cached_is_not_moved_back() -> None:
    """Otherwise a transfer is paid for what is there already."""
    rig, first, second = short()
    moved = rig.executor.swapped_out_count
    rig.cancel(first)
    rig.run()
    assert second.cached_token_count > 0
    assert rig.executor.swapped_in_count < moved
    assert second.recomputed_token_count == 0


def test_a_copy_that_was_found_is_not_made_into_a_block_that_is_moved_in() -> None:
    """Two writers of one block in one step: which comes last would be up to the executor."""
    rig, first, second = short(usable=7)
    rig.cancel(first)
    rig.queue.remove(second)
    rig.turns(3)
    evict(rig)
    # What is found of it then ends within a block.
    rig.submit(list(second.tokens[: SIZE + 5]), max_tokens=1)
    rig.turns(4)
    rig.queue.put_back([second])
    rig.run()
    assert second.cached_token_count == SIZE + 5
    assert second.recomputed_token_count == 0
    assert rig.output[second] == rig.expected(second)


def sharing(rig: Rig) -> tuple[Sequence, Sequence]:
    """Submits two sequences that share four blocks; the second gives way in a pool of 12."""
    prompt = [(3 * place) % 250 + 1 for place in range(4 * SIZE)]
    first = rig.submit([*prompt, 1], max_tokens=90)
    rig.turns(2)
    return first, rig.submit([*prompt, 2], max_tokens=90)


def test_a_block_that_another_one_names_stays_where_it_is() -> None:
    """It is found again, and moving it would cost room and time for nothing."""
    rig = Rig(12, swap=ALWAYS)
    first, second = sharing(rig)
    draft = preempting_step(rig, second)
    assert second.blocks[:4] == first.blocks[:4]
    assert draft.swap_out[::2] == second.blocks[4:]
    rig.run()
    assert second.recomputed_token_count == 0


@pytest.mark.parametrize("how", ["ends", "returns"])
def test_the_last_one_who_names_a_shared_block_takes_it_along_for_all(how: str) -> None:
    """Who left its prompt with another one must not compute it again because that one has ended."""
    rig = Rig(12, swap=ALWAYS)
    first, second = sharing(rig)
    assert rig.turns_until_preempted(first, second) == [second]
    rig.queue.remove(second)
    rig.cancel(first)
    draft = rig.plan()
    assert draft.removed == [first.table]
    assert draft.swap_out[::2] == first.blocks[:4]
    rig.land()
    evict(rig)
    if how == "returns":
        # Somebody who computes the same is there by then, and has not confirmed it.
        rig.submit([*second.tokens[: 4 * SIZE], 3], max_tokens=9)
        rig.admit()
    rig.queue.put_back([second])
    rig.run()
    assert second.recomputed_token_count == 0
    assert rig.output[second] == rig.expected(second)


def test_slots_return_however_a_sequence_ends() -> None:
    """While it is moved, while it waits, while it is on its way back: a slot that is forgotten is lost for good."""
    for turns in range(8):
        rig, first, second = short(depth=2)
        rig.turns(turns)
        rig.cancel(second)
        rig.cancel(first)
        rig.run()


def test_without_room_in_host_memory_a_victim_is_computed_again() -> None:
    """All of it or nothing: what is half there has to be computed from its beginning."""
    rig, _, second = short(swap=SwapSettings(2, mode=PreemptionMode.SWAP))
    rig.run()
    assert rig.executor.swapped_out_count == 0
    assert second.recomputed_token_count > 0
    assert rig.output[second] == rig.expected(second)


def test_what_others_hold_is_no_room() -> None:
    """Several gateways have one executor's host memory together."""
    rig = Rig(6, swap=SwapSettings(8, mode=PreemptionMode.SWAP))
    rig.executor.elsewhere = lambda: 6
    first, second = pair(rig)
    assert rig.turns_until_preempted(first, second) == [second]
    assert second.swapped is None
    rig.run()
    assert rig.executor.refused_count == 0


def test_a_slot_that_was_refused_is_not_counted_on() -> None:
    """Another gateway was first: whoever reads such a slot gets its content, or none."""
    rig = Rig(6, swap=ALWAYS)
    _, second = pair(rig)
    preempting_step(rig, second)
    rig.executor.elsewhere = lambda: 63
    rig.land()
    rig.executor.elsewhere = int
    assert (second.swapped, second.swap_count) == (None, 0)
    rig.run()
    assert second.recomputed_token_count > 0
    assert rig.output[second] == rig.expected(second)
    assert rig.core.pool(POOL_ID).memory.statistics.swap_count == 0


def test_who_is_in_the_host_memory_of_an_executor_waits_for_that_one() -> None:
    """Another executor of the same model would compute all of it again; once the slots are void, any may take it."""
    rig, _, second = short()
    later = rig.submit(SIZE)
    assert rig.queue.pop(pool_id="another") is later
    assert rig.queue.pop(pool_id="another") is None
    assert second.swapped is not None
    rig.scheduler.swapping.abandon()
    assert rig.queue.pop(pool_id="another") is second


def test_what_comes_back_waits_for_nobody_who_computes_the_same() -> None:
    """It has all of it already: waiting for a prefix to be published would only keep it out."""
    rig, _, second = short()
    request = admit_request(rig.scheduler.pool, second, wait_for_prefix=True)
    assert second.swapped is not None
    assert (request.wait_for_prefix, request.swapped_token_count) == (False, second.swapped.token_count)
    rig.scheduler.swapping.abandon()
    request = admit_request(rig.scheduler.pool, second, wait_for_prefix=True)
    assert (request.wait_for_prefix, request.swapped_token_count) == (True, 0)


def rates(bytes_per_second: float) -> SwapSettings:
    """Returns host memory that blocks of 1,024 bytes move to and from at a rate; a token takes a microsecond."""
    return SwapSettings(64, bytes_per_second, bytes_per_second)


@pytest.mark.parametrize(("microseconds", "swaps"), [(7.0, True), (9.0, False)])
def test_moving_is_compared_with_computing_again(microseconds: float, swaps: bool) -> None:
    """A block holds 16 tokens, and goes there and back: at 8 microseconds each way both cost the same."""
    rig, _, second = short(swap=rates(1024e6 / microseconds))
    assert second.scheduled % SIZE == 0
    assert (second.swapped is not None) == swaps
    rig.run()
    assert rig.output[second] == rig.expected(second)


def test_what_is_likely_to_be_found_again_is_worth_no_transfer() -> None:
    """Of what is found again nothing is computed and nothing moved back, but all of it would have been moved out."""
    rig = Rig(6, swap=rates(1024e6 / 7))
    rig.scheduler.swapping.found.add(80, 100)
    first, second = pair(rig)
    assert rig.turns_until_preempted(first, second) == [second]
    # 7 there and 1.4 back for a block, against a fifth of 16.
    assert second.swapped is None


def test_until_a_prompt_was_computed_nothing_is_moved() -> None:
    """A guess would be wrong by a hundred from one machine to another."""
    rig = Rig(6, swap=rates(1e12))
    rig.executor.says_how_long = False
    first, second = pair(rig)
    assert rig.turns_until_preempted(first, second) == [second]
    assert second.swapped is None


def test_nobody_is_held_back_for_what_is_in_host_memory() -> None:
    """Elsewhere blocks are spent on few after a preemption, so that the victim finds its own again."""
    rig, first, second = short()
    assert second.swapped is not None
    assert not rig.scheduler._shortage.lasts
    rig.run()
    assert first.recomputed_token_count == second.recomputed_token_count == 0


def test_blocks_of_a_swapped_sequence_are_not_the_last_to_be_evicted() -> None:
    """They are in host memory: what others would find again is worth more."""
    rig, _, second = short()
    pool = rig.core.pool(POOL_ID).memory.pool
    assert second.state is SequenceState.WAITING
    assert not pool._awaited
