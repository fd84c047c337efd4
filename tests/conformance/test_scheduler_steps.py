"""What a step may hold: tokens, one prompt's share of them, sequences."""

from __future__ import annotations

import pytest

from gateway.core.sequence import Sequence, SequenceState
from gateway.core.step import StepDraft
from tests.conformance.scheduler_rig import SIZE, Rig


def counts(draft: StepDraft, *sequences: Sequence) -> list[int]:
    """Returns the tokens that a step computes of each sequence."""
    planned = dict(zip(draft.scheduled_tables, draft.scheduled_counts, strict=True))
    return [planned.get(sequence.table, 0) for sequence in sequences]


@pytest.mark.row(47)
@pytest.mark.parametrize(("budget", "depth"), [(24, 1), (24, 2), (4, 2)])
def test_row_47_no_step_exceeds_its_tokens(budget: int, depth: int) -> None:
    """A step too large fails at the executor, or lasts so long that everybody's next token is late."""
    rig = Rig(budget=budget, depth=depth)
    lengths = (1, 1, 1, 1, 1, 1, 3, 100, 24, 25, 150, 7, 48)
    sequences = [rig.submit(length, max_tokens=12 + length % 11) for length in lengths]
    seen = []
    while any(sequence.state is not SequenceState.FINISHED for sequence in sequences):
        rig.turn()
        seen += [sum(draft.scheduled_counts) for draft, _ in rig.in_flight]
    seen.append(rig.executor.largest_step)
    assert max(seen) == budget, "the budget is never used up, or exceeded"
    for sequence in sequences:
        assert rig.output[sequence] == rig.expected(sequence)


@pytest.mark.row(47)
def test_row_47_a_long_prompt_goes_on_where_it_stopped_behind_those_that_need_one_token() -> None:
    """Chunks that overlap compute twice, chunks with a gap compute nonsense, and nobody's next token waits for one."""
    rig = Rig(budget=64)
    talking = rig.submit(5)
    rig.turn()
    long = rig.submit(150, max_tokens=6)
    rig.admit()
    seen = []
    for _ in range(4):
        seen.append(counts(rig.plan(), talking, long))
        rig.land()
    assert seen == [[1, 63], [1, 63], [1, 24], [1, 1]]
    rig.cancel(talking)
    rig.run()
    assert rig.output[long] == rig.expected(long)


@pytest.mark.row(48)
def test_row_48_one_prompt_takes_its_share_while_others_take_part_and_all_when_it_is_alone() -> None:
    """A bound that also holds for a lone prompt makes it slow for nobody's sake."""
    rig = Rig(budget=64, threshold=20)
    long = rig.submit(400, max_tokens=6)
    rig.admit()
    assert counts(rig.plan(), long) == [64]
    rig.land()
    other = rig.submit(45, max_tokens=3)
    rig.admit()
    seen = []
    while other.state is not SequenceState.FINISHED:
        seen.append(counts(rig.plan(), long, other))
        rig.land()
    assert seen[:5] == [[20, 20], [20, 20], [20, 5], [20, 1], [20, 1]]
    assert counts(rig.plan(), long) == [64]
    rig.land()
    rig.run()
    assert rig.output[long] == rig.expected(long)


@pytest.mark.row(48)
def test_row_48_without_a_bound_the_first_prompt_takes_what_there_is() -> None:
    """The default must cost nobody throughput."""
    rig = Rig(budget=64)
    first, second = rig.submit(100), rig.submit(100)
    rig.admit()
    assert [counts(rig.plan(), first, second) for _ in range(2)] == [[64, 0], [36, 28]]


@pytest.mark.row(49)
@pytest.mark.parametrize("depth", [1, 3])
def test_row_49_never_more_tables_than_allowed_closing_ones_included(depth: int) -> None:
    """The executor has so many rows: one table more fails a request that did nothing wrong."""
    rig = Rig(12, max_num_seqs=3, depth=depth)
    sequences = [rig.submit(10 + 3 * place, max_tokens=9 + 7 * place) for place in range(7)]
    most = 0
    while any(sequence.state is not SequenceState.FINISHED for sequence in sequences):
        rig.turn()
        assert rig.scheduler.open_count <= 3
        assert len(rig.executor.rows) <= 3
        most = max(most, rig.scheduler.open_count)
    assert most == 3


@pytest.mark.row(49)
def test_row_49_those_that_pause_for_want_of_a_block_count() -> None:
    """A paused sequence goes on as soon as it can: whoever took its place would be one too many."""
    rig = Rig(16, max_num_seqs=2, budget=256)
    paused, other = rig.submit(SIZE), rig.submit(SIZE - 6)
    rig.turn()
    held = rig.scheduler.lease.surrender()
    rig.scheduler.lease.refilling = True
    newcomer = rig.submit(3)
    for _ in range(3):
        rig.turn()
        assert counts(rig.in_flight[0][0] if rig.in_flight else StepDraft(), paused) == [0]
        assert (paused.scheduled, rig.scheduler.running_count) == (SIZE, 2)
    assert newcomer not in rig.asked
    rig.scheduler.lease.refilled(held, len(held))
    rig.turn()
    assert (paused.scheduled, other.state) == (SIZE + 1, SequenceState.RUNNING)
    assert newcomer not in rig.asked
