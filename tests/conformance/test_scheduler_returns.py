"""When blocks come back: behind the fence of the last step that may write to them, and never before."""

from __future__ import annotations

import pytest

from gateway.core.sequence import SequenceState
from quire.memory import CloseReason
from tests.conformance.scheduler_rig import SIZE, Rig


def fill(rig: Rig, depth: int) -> None:
    """Plans until so many steps are in flight."""
    while len(rig.in_flight) < depth:
        assert rig.plan()


@pytest.mark.row(51)
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_row_51_blocks_of_a_finished_sequence_return_behind_the_last_step_that_may_write_to_them(depth: int) -> None:
    """A block that is handed out while a step in flight still writes to it corrupts its next owner."""
    rig = Rig(budget=256)
    other = rig.submit(SIZE)
    ending = rig.submit(2 * SIZE, stop_at=4)
    rig.turn()
    while ending.state is SequenceState.RUNNING:
        fill(rig, depth)
        rig.land()
    table, held = ending.table, rig.used()
    last = max((place for place, (draft, _) in enumerate(rig.in_flight) if table in draft.scheduled_tables), default=-1)
    assert last == depth - 2, "steps that were planned before the end was known still write"
    landed = 0
    while not rig.closed:
        rig.plan()
        assert rig.used() >= held
        rig.land()
        landed += 1
    assert rig.closed == [table]
    assert landed == depth, "the step that was planned next is the fence, and there is no other wait"
    assert rig.used() < held
    assert other.state is SequenceState.RUNNING


@pytest.mark.row(51)
def test_row_51_with_no_step_in_flight_they_return_at_once() -> None:
    """A pool that waits for traffic to get its blocks back is full when traffic comes."""
    rig = Rig(budget=256)
    ending = rig.submit(2 * SIZE, max_tokens=1)
    rig.turn()
    assert (ending.state, rig.used(), len(rig.in_flight)) == (SequenceState.CLOSING, 2, 0)
    draft = rig.plan()
    assert (draft.removed, draft.scheduled_tables) == ([ending.table], [])
    rig.land()
    assert (rig.used(), ending.state) == (0, SequenceState.FINISHED)


@pytest.mark.row(52)
@pytest.mark.parametrize("reason", ["cancelled", "preempted"])
def test_row_52_cancelled_and_preempted_ones_leave_the_books_at_once_and_their_blocks_behind_the_fence(
    reason: str,
) -> None:
    """Nothing more is computed for who has left, and nothing it may still write to is given away."""
    rig = Rig(5 if reason == "preempted" else 64, budget=256)
    stays, leaves = rig.submit(SIZE), rig.submit(2 * SIZE + 5)
    rig.turn()
    fill(rig, 2)
    if reason == "cancelled":
        rig.cancel(leaves)
    else:
        planned = 0
        while leaves.state is SequenceState.RUNNING:
            rig.plan()
            planned += 1
            assert planned < 100
    table, used, delivered = leaves.table, rig.used(), len(rig.output[leaves])
    assert any(table in draft.scheduled_tables for draft, _ in rig.in_flight), "no step in flight writes to it"
    assert rig.running() == [stays]
    assert (rig.scheduler.running_count, rig.scheduler.open_count) == (1, 2)
    while not rig.closed:
        draft = rig.plan()
        assert table not in draft.scheduled_tables
        assert rig.used() >= used
        update = rig.land()
    assert update.journal.close_reasons == [CloseReason[reason.upper()]]
    assert rig.used() < used
    if reason == "cancelled":
        assert len(rig.output[leaves]) == delivered
        assert leaves.state is SequenceState.FINISHED
    else:
        assert rig.queue.pop() is leaves


@pytest.mark.row(52)
def test_row_52_who_is_cancelled_while_it_is_preempted_does_not_come_back() -> None:
    """A client that has left must not be computed for again."""
    rig = Rig(5, budget=256)
    rig.submit(SIZE)
    leaves = rig.submit(2 * SIZE + 5)
    rig.admit()
    for _ in range(2 * SIZE):
        rig.plan()
    assert leaves.state is SequenceState.CLOSING
    rig.cancel(leaves)
    while not rig.closed:
        rig.plan()
        update = rig.land()
    assert (update.requeued, update.released, len(rig.queue)) == ([], [leaves], 0)
    assert update.journal.close_reasons == [CloseReason.CANCELLED]
    assert leaves.state is SequenceState.FINISHED


@pytest.mark.row(53)
def test_row_53_returns_go_in_the_order_of_their_fences_each_at_its_own() -> None:
    """One sequence that ends later must not hold back the blocks of all that ended before it."""
    rig = Rig(budget=256)
    rig.submit(SIZE - 2)
    ending = [rig.submit((place + 1) * SIZE, max_tokens=3 + place) for place in (2, 0, 1)]
    rig.turn()
    tables = {sequence: sequence.table for sequence in ending}
    order, used = [], []
    while len(rig.closed) < 3:
        fill(rig, 3)
        before = len(rig.closed)
        rig.land()
        if len(rig.closed) > before:
            order += rig.closed[before:]
            used.append(rig.used())
    by_end = sorted(ending, key=lambda sequence: sequence.request.settings.max_tokens)
    assert order == rig.closed == [tables[sequence] for sequence in by_end]
    assert len(used) == 3, "returns that have nothing to do with each other came together"
    assert used == sorted(used, reverse=True)


@pytest.mark.row(53)
def test_row_53_what_ends_between_two_steps_returns_together_in_its_order() -> None:
    """The order of returns is that of eviction: shuffled, the cache would lose what was used last."""
    rig = Rig(budget=256, depth=2)
    sequences = [rig.submit(SIZE + place) for place in range(5)]
    rig.turns(3)
    tables = [sequence.table for sequence in sequences]
    for place in (3, 0, 4):
        rig.cancel(sequences[place])
    while not rig.closed:
        rig.turn()
    assert rig.closed == [tables[3], tables[0], tables[4]]
