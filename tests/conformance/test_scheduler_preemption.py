"""Who gives way when memory is short, and what becomes of who does."""

from __future__ import annotations

import pytest

from gateway.core.precedence import SchedulingPolicy
from gateway.core.sequence import SequenceState
from tests.conformance.scheduler_rig import SIZE, Rig, preempted


@pytest.mark.row(36)
def test_row_36_a_shortage_preempts_until_the_step_fits() -> None:
    """One victim too few and somebody waits for good; one too many and its work is thrown away."""
    rig = Rig(7, budget=128)
    growing = [rig.submit(SIZE) for _ in range(3)]
    others = [rig.submit(SIZE - 6) for _ in range(4)]
    rig.turn()
    assert rig.scheduler.running_count == 7
    assert rig.turns_until_preempted(*growing, *others) == others[1:]
    rig.turns(3)
    assert [len(sequence.blocks) for sequence in growing] == [2, 2, 2]
    assert others[0].state is SequenceState.RUNNING


@pytest.mark.row(36)
def test_row_36_nobody_gives_way_while_others_go_on_and_may_end() -> None:
    """What sits out is not lost: whoever ends first gives it a block, and nothing is computed twice."""
    rig = Rig(4)
    waits, ends = rig.submit(SIZE), rig.submit(2 * SIZE + 2, max_tokens=9)
    rig.turns(7)
    assert (len(waits.blocks), waits.scheduled) == (1, SIZE)
    rig.cancel(rig.submit(1))
    rig.turns(8)
    assert ends.state is SequenceState.FINISHED
    assert len(waits.blocks) == 2
    assert not preempted([waits, ends])


@pytest.mark.row(36)
def test_row_36_who_needs_the_block_gives_way_itself_if_it_is_the_last() -> None:
    """A latecomer must not take the blocks of those before it."""
    rig = Rig(3)
    first, needy = rig.submit(SIZE + 4), rig.submit(SIZE)
    assert rig.turns_until_preempted(first, needy) == [needy]
    assert first.state is SequenceState.RUNNING


@pytest.mark.row(36)
def test_row_36_what_is_on_its_way_back_is_counted() -> None:
    """Otherwise everybody is preempted, one after the other, while the blocks of the first are awaited."""
    rig = Rig(7)
    sequences = [rig.submit(SIZE), *(rig.submit(SIZE - 6) for _ in range(6))]
    rig.turn()
    for _ in range(SIZE):
        rig.plan()
    assert preempted(sequences) == sequences[-3:]


@pytest.mark.row(37)
def test_row_37_the_victim_is_the_latest_admitted() -> None:
    """First come, first served: who has waited longest goes on."""
    rig = Rig(9)
    sequences = [rig.submit(3 * SIZE - 6), rig.submit(3 * SIZE), rig.submit(3 * SIZE - 6)]
    assert rig.turns_until_preempted(*sequences) == [sequences[-1]]


@pytest.mark.row(37)
def test_row_37_under_priorities_the_lowest_gives_way_and_of_those_the_latest_to_arrive() -> None:
    """Admission says nothing about who matters: a request that matters less gives way though it was there first."""
    rig = Rig(5, policy=SchedulingPolicy.PRIORITY)
    last = rig.submit(SIZE - 6, priority=5, arrived_at=3.0)
    rig.admit()
    beside = rig.submit(SIZE - 6, priority=5, arrived_at=2.0)
    rig.admit()
    middle = rig.submit(SIZE - 6, priority=1, arrived_at=9.0)
    first = rig.submit(SIZE, priority=-3, arrived_at=10.0)
    late = rig.submit(SIZE - 6, priority=0, arrived_at=11.0)
    rig.turns(2)
    assert preempted([last, beside, middle, first, late]) == [last]


@pytest.mark.row(37)
def test_row_37_under_priorities_the_first_get_tokens_and_blocks_first() -> None:
    """A priority that only the queue knows is worth nothing to a request that runs."""
    rig = Rig(64, budget=32, policy=SchedulingPolicy.PRIORITY)
    low = rig.submit(100, priority=1)
    rig.admit()
    high = rig.submit(40)
    rig.admit()
    counts = [
        dict(zip(draft.scheduled_tables, draft.scheduled_counts, strict=True)) for draft in (rig.plan(), rig.plan())
    ]
    assert counts == [{high.table: 32}, {high.table: 8, low.table: 24}]


@pytest.mark.row(38)
def test_row_38_who_was_preempted_keeps_its_tokens_and_is_first_in_the_queue_again() -> None:
    """A preemption costs time, never a token, and nobody who came later gets ahead through it."""
    rig = Rig(4)
    first, second = rig.submit(2 * SIZE - 2), rig.submit(SIZE + 4, max_tokens=40)
    rig.turn()
    later = rig.submit(SIZE)
    assert rig.turns_until_preempted(first, second) == [second]
    had = list(second.tokens)
    assert len(had) > second.prompt_length
    rig.plan()
    rig.land()
    assert rig.closed
    assert (second.state, second.preemption_count) == (SequenceState.WAITING, 1)
    assert (list(second.tokens)[: len(had)], second.computed, second.scheduled, second.blocks) == (had, 0, 0, [])
    assert (rig.queue.pop(), rig.queue.pop()) == (second, later)
    rig.queue.put_back([later, second])
    rig.cancel(first)
    rig.cancel(later)
    rig.run()
    assert rig.output[second] == rig.expected(second)
    assert second.request.preemption_count == 1


@pytest.mark.row(39)
@pytest.mark.parametrize("depth", [3, 4, 5])
def test_row_39_what_steps_in_flight_sampled_for_a_victim_is_delivered_once_and_in_order(depth: int) -> None:
    """A client must see each token of its answer once, whoever needed its blocks meanwhile."""
    rig = Rig(6, depth=depth)
    sequences = [rig.submit(SIZE - 3 + place, max_tokens=60) for place in range(4)]
    late = 0
    for _ in range(400):
        closing = [sequence for sequence in sequences if sequence.state is SequenceState.CLOSING and not sequence.ended]
        before = [len(rig.output[sequence]) for sequence in closing]
        rig.turn()
        late += sum(len(rig.output[sequence]) for sequence in closing) - sum(before)
    assert late, "what a step sampled for a victim was not delivered, and is computed again"
    rig.run()
    assert len(preempted(sequences)) > 1
    for sequence in sequences:
        assert rig.output[sequence] == rig.expected(sequence)


@pytest.mark.row(41)
def test_row_41_nobody_is_admitted_in_a_step_that_preempted() -> None:
    """Blocks that were taken from one sequence are for those that run, not for a newcomer."""
    rig = Rig(4, depth=2)
    sequences = [rig.submit(SIZE), rig.submit(SIZE - 6), rig.submit(SIZE - 6), rig.submit(SIZE - 6)]
    rig.turns(2)
    newcomer = rig.submit(1)
    while not preempted(sequences):
        rig.turn()
    assert not rig.scheduler.can_admit()
    while not rig.closed:
        rig.turn()
    rig.turn()
    assert newcomer not in rig.asked
    assert len(sequences[0].blocks) == 2


@pytest.mark.row(41)
def test_row_41_nor_while_the_blocks_of_the_victim_are_on_their_way() -> None:
    """Who was preempted stands before the newcomer, and has given up blocks that are not back yet."""
    rig = Rig(6)
    first, needy = rig.submit(2 * SIZE), rig.submit(SIZE)
    rig.turn()
    held = rig.scheduler.lease.surrender() + rig.take(rig.available())
    assert len(held) == 3
    assert rig.plan().removed == [needy.table]
    assert preempted([first, needy]) == [needy]
    newcomer = rig.submit(1)
    rig.give_back(held)
    rig.scheduler.lease.exhausted = False
    rig.plan()
    assert len(first.blocks) == 3
    rig.admit()
    assert rig.asked == [first, needy]
    rig.land()
    rig.admit()
    assert rig.asked[2:] == [needy, newcomer]


@pytest.mark.row(46)
def test_row_46_who_matters_more_preempts_nobody_while_there_is_room() -> None:
    """A priority is a place in line, not a right to undo what others have computed."""
    rig = Rig(12, policy=SchedulingPolicy.PRIORITY, max_num_seqs=3)
    running = [rig.submit(SIZE, priority=5, max_tokens=30), rig.submit(SIZE, priority=6, max_tokens=30)]
    rig.turns(3)
    urgent = rig.submit(2 * SIZE, priority=-1, max_tokens=30)
    rig.turn()
    assert urgent.state is SequenceState.RUNNING
    second = rig.submit(SIZE, priority=-2, max_tokens=30)
    rig.turn()
    assert second.state is SequenceState.WAITING
    rig.run()
    assert rig.scheduler.stats.preemption_count == 0
    assert [rig.output[sequence] for sequence in running] == [rig.expected(sequence) for sequence in running]
