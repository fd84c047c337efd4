"""The rules of the scheduler, each taken out once, and the scenario that notices."""

from __future__ import annotations

from typing import Final

from tests.mutants.mutation import Mutant

_SCHEDULER: Final = "gateway.core.scheduler:Scheduler"

GATEWAY: Final = (
    Mutant(
        "the earliest admitted gives way",
        "gateway.core.scheduler:choose_victim",
        "place_in_step(sequence, policy)",
        "0",
        "blocks_on_their_way_count",
    ),
    Mutant(
        "the last sequence gives way to nobody",
        "gateway.core.preemption:choose_victim",
        "if place != first",
        "",
        "row 78: first",
    ),
    Mutant(
        "a block is taken a token late",
        f"{_SCHEDULER}.schedule",
        "scheduled == sequence.room",
        "scheduled == sequence.room + 1",
        "a_block_is_taken_when_the_last_is_full",
    ),
    Mutant(
        "a sequence without a block takes part all the same",
        f"{_SCHEDULER}._grow",
        "return False",
        "return True",
        "a_stalled_sequence_holds_admissions_back",
    ),
    Mutant(
        "newcomers are admitted while somebody waits for a block",
        f"{_SCHEDULER}.can_admit",
        "and self._unmet == 0",
        "",
        "a_stalled_sequence_holds_admissions_back",
    ),
    Mutant(
        "newcomers are admitted while somebody is preempted",
        f"{_SCHEDULER}.can_admit",
        "any(reason is CloseReason.PREEMPTED for _, reason in self._closing.values())",
        "False",
        "the_latest_is_preempted_and_comes_back",
    ),
    Mutant(
        "a preempted sequence forgets that it waits",
        f"{_SCHEDULER}._fenced",
        "update.requeued.append(sequence)",
        "pass",
        "the_latest_is_preempted_and_comes_back",
    ),
    Mutant(
        "a step exceeds its budget",
        f"{_SCHEDULER}._fill",
        "min(sequence.total - sequence.scheduled, budget, longest)",
        "sequence.total - sequence.scheduled",
        "limits_hold",
    ),
    Mutant(
        "more sequences than allowed hold a table",
        f"{_SCHEDULER}.can_admit",
        "self.open_count < self._max_num_seqs",
        "True",
        "limits_hold",
    ),
    Mutant(
        "a full block is told of a step late",
        "gateway.core.scheduler:report_at",
        "computed - computed % block_size + block_size",
        "computed - computed % block_size + block_size + 1",
        "a_block_is_told_when_it_is_full",
    ),
    Mutant(
        "the end of a prompt is told with the block that it is in",
        "gateway.core.scheduler:report_at",
        "min(filled, sequence.prompt_length) if computed < sequence.prompt_length else filled",
        "filled",
        "a_block_is_told_when_it_is_full",
    ),
    Mutant(
        "the source of a copy is held until a block is full",
        "gateway.core.scheduler:report_at",
        "if copying or sequence.stepwise:",
        "if False:",
        "a_copy_is_told_when_it_has_run",
    ),
    Mutant(
        "everybody is told of in every step",
        f"{_SCHEDULER}.update",
        "if count >= sequence.report_at:",
        "if count:",
        "a_block_is_told_when_it_is_full",
    ),
    Mutant(
        "what is in the last block is lost when its table closes",
        f"{_SCHEDULER}._fenced",
        "report(sequence, update.journal)",
        "pass",
        "a_block_is_told_when_it_is_full",
    ),
    Mutant(
        "tokens in flight behind the last one are told as written",
        "gateway.core.scheduler:report",
        "min(sequence.computed, known)",
        "sequence.computed",
        "a_block_is_told_when_it_is_full",
    ),
    Mutant(
        "a lease hands the same block out twice",
        "gateway.core.lease:GrowthLease.take",
        "self._stock.pop()",
        "self._stock[-1]",
        "a_block_is_taken_when_the_last_is_full",
    ),
)
