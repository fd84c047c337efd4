"""The rows of the scheduler as scenarios: each test of a row is what must fail when its rule is gone."""

from __future__ import annotations

from collections.abc import Callable
import functools

from gateway.core.precedence import SchedulingPolicy
from tests.conformance import (
    test_scheduler_admission,
    test_scheduler_endings,
    test_scheduler_fairness,
    test_scheduler_preemption,
    test_scheduler_returns,
    test_scheduler_shortage,
    test_scheduler_steps,
)
from tests.conformance.scheduler_rig import SIZE

admission, endings, preemption = test_scheduler_admission, test_scheduler_endings, test_scheduler_preemption
returns, shortage, steps = test_scheduler_returns, test_scheduler_shortage, test_scheduler_steps
fairness = test_scheduler_fairness

SCENARIOS: dict[str, Callable[[], None]] = {
    "row 36: until it fits": preemption.test_row_36_a_shortage_preempts_until_the_step_fits,
    "row 36: others go on": preemption.test_row_36_nobody_gives_way_while_others_go_on_and_may_end,
    "row 36: itself": preemption.test_row_36_who_needs_the_block_gives_way_itself_if_it_is_the_last,
    "row 36: on its way": preemption.test_row_36_what_is_on_its_way_back_is_counted,
    "row 37: the latest": preemption.test_row_37_the_victim_is_the_latest_admitted,
    "row 37: the lowest": (
        preemption.test_row_37_under_priorities_the_lowest_gives_way_and_of_those_the_latest_to_arrive
    ),
    "row 37: steps": preemption.test_row_37_under_priorities_the_first_get_tokens_and_blocks_first,
    "row 38": preemption.test_row_38_who_was_preempted_keeps_its_tokens_and_is_first_in_the_queue_again,
    "row 39": functools.partial(
        preemption.test_row_39_what_steps_in_flight_sampled_for_a_victim_is_delivered_once_and_in_order,
        3,
    ),
    "row 41: in the step": preemption.test_row_41_nobody_is_admitted_in_a_step_that_preempted,
    "row 41: on their way": preemption.test_row_41_nor_while_the_blocks_of_the_victim_are_on_their_way,
    "row 42: alone": admission.test_row_42_a_lone_request_is_never_held_back_by_headroom,
    "row 42: growth": admission.test_row_42_headroom_is_kept_from_newcomers_and_not_from_those_that_run,
    "row 43": admission.test_row_43_a_request_starts_only_when_its_whole_prompt_fits,
    "row 44": functools.partial(
        admission.test_row_44_the_blocks_that_admission_foresees_are_those_that_it_takes,
        4 * SIZE,
        2 * SIZE,
    ),
    "row 45: order": admission.test_row_45_the_queue_goes_by_priority_then_arrival_then_id,
    "row 45: returns": functools.partial(
        admission.test_row_45_the_order_survives_skips_and_returns, SchedulingPolicy.FCFS
    ),
    "row 45: starts": functools.partial(
        admission.test_row_45_requests_start_in_the_order_of_the_queue, SchedulingPolicy.PRIORITY
    ),
    "row 78: first": shortage.test_row_78_the_first_never_gives_way,
    "row 78: cheapest": shortage.test_row_78_the_victim_loses_fewest_tokens_for_each_block,
    "row 78: cached": shortage.test_row_78_what_was_found_in_the_cache_is_not_lost,
    "row 78: cap": shortage.test_row_78_nobody_gives_way_beyond_the_cap_while_there_is_another,
    "row 78: sparing": shortage.test_row_78_what_the_preempted_gave_up_is_spent_on_few,
    "row 78: freely": shortage.test_row_78_what_the_ended_gave_back_is_spent_freely,
    "row 46": preemption.test_row_46_who_matters_more_preempts_nobody_while_there_is_room,
    "row 47": functools.partial(steps.test_row_47_no_step_exceeds_its_tokens, 4, 2),
    "row 47: chunks": steps.test_row_47_a_long_prompt_goes_on_where_it_stopped_behind_those_that_need_one_token,
    "row 48": steps.test_row_48_one_prompt_takes_its_share_while_others_take_part_and_all_when_it_is_alone,
    "row 49": functools.partial(steps.test_row_49_never_more_tables_than_allowed_closing_ones_included, 3),
    "row 49: paused": steps.test_row_49_those_that_pause_for_want_of_a_block_count,
    "row 50: nothing follows": functools.partial(endings.test_row_50_nothing_follows_a_stop, 3),
    "row 50: min_tokens": functools.partial(endings.test_row_50_min_tokens_puts_stops_off, preempting=True),
    "row 51: fence": functools.partial(
        returns.test_row_51_blocks_of_a_finished_sequence_return_behind_the_last_step_that_may_write_to_them,
        2,
    ),
    "row 51: at once": returns.test_row_51_with_no_step_in_flight_they_return_at_once,
    "row 52": functools.partial(
        returns.test_row_52_cancelled_and_preempted_ones_leave_the_books_at_once_and_their_blocks_behind_the_fence,
        "cancelled",
    ),
    "row 52: both": returns.test_row_52_who_is_cancelled_while_it_is_preempted_does_not_come_back,
    "row 53: each": returns.test_row_53_returns_go_in_the_order_of_their_fences_each_at_its_own,
    "late: stop": functools.partial(
        endings.test_a_stop_that_nobody_foresaw_wastes_a_token_for_each_further_step_in_flight_and_shows_none, 2
    ),
    "late: length": functools.partial(endings.test_an_end_by_length_wastes_nothing, 2),
    "fair: many requests": fairness.test_a_tenant_with_many_requests_does_not_keep_another_waiting,
    "fair: long answers": fairness.test_what_a_tenant_generates_counts_and_not_how_many_requests_it_sends,
    "fair: long prompts": fairness.test_long_prompts_count,
    "fair: no savings": fairness.test_nobody_saves_up_what_it_did_not_use,
    "fair: preempted": fairness.test_who_was_preempted_comes_before_whoever_has_not_run,
    "ageing": fairness.test_an_old_request_goes_before_a_new_one_that_is_more_urgent,
    "row 53: order": returns.test_row_53_what_ends_between_two_steps_returns_together_in_its_order,
}
