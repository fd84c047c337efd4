"""Preemption by swap as scenarios: each test is what must fail when its rule is gone."""

from __future__ import annotations

from collections.abc import Callable
import functools

from tests.conformance import test_scheduler_swapping as swapping

SCENARIOS: dict[str, Callable[[], None]] = {
    "swap: nothing twice": functools.partial(swapping.test_who_comes_back_from_host_memory_computes_nothing_twice, 2),
    "swap: in flight": swapping.test_what_steps_in_flight_write_into_a_victim_is_moved_with_it,
    "swap: behind its writes": (
        swapping.test_the_step_that_removes_a_victim_moves_its_blocks_which_return_with_its_fence
    ),
    "swap: two phases": swapping.test_what_is_moved_in_can_be_matched_when_the_step_is_acknowledged,
    "swap: told": swapping.test_what_was_moved_in_is_told_though_nothing_is_computed_behind_it_yet,
    "swap: cached": swapping.test_what_is_still_cached_is_not_moved_back,
    "swap: copy": swapping.test_a_copy_that_was_found_is_not_made_into_a_block_that_is_moved_in,
    "swap: stays": swapping.test_a_block_that_another_one_names_stays_where_it_is,
    "swap: taken along": functools.partial(
        swapping.test_the_last_one_who_names_a_shared_block_takes_it_along_for_all, "ends"
    ),
    "swap: at home": swapping.test_who_is_in_the_host_memory_of_an_executor_waits_for_that_one,
    "swap: waits for nobody": swapping.test_what_comes_back_waits_for_nobody_who_computes_the_same,
    "swap: slots": swapping.test_slots_return_however_a_sequence_ends,
    "swap: no room": swapping.test_without_room_in_host_memory_a_victim_is_computed_again,
    "swap: others": swapping.test_what_others_hold_is_no_room,
    "swap: refused": swapping.test_a_slot_that_was_refused_is_not_counted_on,
    "swap: cheaper": functools.partial(swapping.test_moving_is_compared_with_computing_again, 9.0, swaps=False),
    "swap: dearer": functools.partial(swapping.test_moving_is_compared_with_computing_again, 7.0, swaps=True),
    "swap: found again": swapping.test_what_is_likely_to_be_found_again_is_worth_no_transfer,
    "swap: unmeasured": swapping.test_until_a_prompt_was_computed_nothing_is_moved,
    "swap: not spared": swapping.test_nobody_is_held_back_for_what_is_in_host_memory,
    "swap: not awaited": swapping.test_blocks_of_a_swapped_sequence_are_not_the_last_to_be_evicted,
}
