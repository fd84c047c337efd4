"""Who is admitted, and when: the queue's order, the room that a request needs, and the room that is kept."""

from __future__ import annotations

import itertools
import random

import pytest

from gateway.core.precedence import SchedulingPolicy
from gateway.core.sequence import SequenceState
from quire.errors import BlockPoolExhaustedError
from quire.units import div_ceil
from tests.conformance.scheduler_rig import SIZE, Rig


@pytest.mark.row(42)
def test_row_42_a_lone_request_is_never_held_back_by_headroom() -> None:
    """Headroom for what runs, where nothing runs, would keep a pool idle for ever."""
    rig = Rig(8, forecast=True)
    leased = rig.take(1)
    lone = rig.submit(7 * SIZE, max_tokens=100, stop_at=10)
    rig.turn()
    assert not rig.refusals
    assert lone.state is SequenceState.RUNNING
    rig.give_back(leased)
    rig.run()


@pytest.mark.row(42)
def test_row_42_headroom_is_kept_from_newcomers_and_not_from_those_that_run() -> None:
    """What is kept is kept for growth: whoever grows into it must not be told that it is kept."""
    rig = Rig(9, forecast=True)
    first = rig.submit(4 * SIZE, max_tokens=4 * SIZE)
    rig.turn()
    second = rig.submit(3 * SIZE, max_tokens=2 * SIZE)
    rig.turn()
    assert rig.refusals
    assert rig.available() >= 3, "there is room for its prompt"
    for _ in range(4 * SIZE - 4):
        rig.turn()
    assert (first.state, len(first.blocks)) == (SequenceState.RUNNING, 8), "growth into the headroom was refused"
    assert second.state is SequenceState.WAITING
    rig.run()
    assert rig.output[second] == rig.expected(second)
    assert rig.scheduler.stats.preemption_count == 0


@pytest.mark.row(43)
def test_row_43_a_request_starts_only_when_its_whole_prompt_fits() -> None:
    """A prompt of which only a chunk fits would hold its blocks and get no further."""
    rig = Rig(12, budget=SIZE)
    first = rig.submit(3 * SIZE, max_tokens=4)
    rig.turn()
    leased = rig.take(rig.available() - 5)
    held = rig.used()
    big = rig.submit(6 * SIZE, max_tokens=4)
    rig.turn()
    assert big.state is SequenceState.WAITING
    assert rig.refusals[-1].metadata["needed_block_count"] == "6"
    assert rig.used() == held, "a refused request holds something"
    while first.state is not SequenceState.FINISHED:
        rig.turn()
        assert big.state is SequenceState.WAITING
    rig.turn()
    assert (big.state, len(big.blocks), big.scheduled) == (SequenceState.RUNNING, 6, SIZE)
    rig.give_back(leased)
    rig.run()


@pytest.mark.row(44)
@pytest.mark.parametrize(
    ("length", "shared"),
    [(1, 0), (SIZE, 0), (SIZE + 1, 0), (4 * SIZE, 0), (4 * SIZE, 2 * SIZE), (4 * SIZE + 5, 4 * SIZE), (70, 40)],
)
def test_row_44_the_blocks_that_admission_foresees_are_those_that_it_takes(length: int, shared: int) -> None:
    """If it foresees fewer it fails half-way; if more, requests wait for room that is there."""
    rig = Rig(24, budget=256)
    stem = list(range(1, shared + 1))
    rig.submit([*stem, 250], max_tokens=300)
    rig.turn()
    asked = rig.submit([*stem, *(251 for _ in range(length - shared))], max_tokens=8)
    assert rig.queue.pop() is asked
    expected = div_ceil(length, SIZE) - shared // SIZE
    blocks = rig.take(rig.available() - (expected - 1))
    with pytest.raises(BlockPoolExhaustedError) as caught:
        rig.ask(asked)
    figures = caught.value.metadata
    assert (int(figures["needed_block_count"]), int(figures["available_block_count"])) == (expected, expected - 1)
    rig.give_back(blocks[:1])
    admission = rig.ask(asked)
    assert (len(admission.block_ids), rig.available()) == (div_ceil(length, SIZE), 0)


@pytest.mark.row(45)
def test_row_45_the_queue_goes_by_priority_then_arrival_then_id() -> None:
    """The order must be one that a user can foresee, down to requests that came at the same moment."""
    rig = Rig(policy=SchedulingPolicy.PRIORITY)
    places = [(-1, 7.0, "z"), (0, 1.0, "b"), (0, 1.0, "c"), (0, 2.0, "a"), (3, 0.0, "y")]
    chance = random.Random(5)
    for shuffled in [chance.sample(places, len(places)) for _ in range(20)]:
        for priority, arrived_at, name in shuffled:
            rig.submit(5, name=name, priority=priority, arrived_at=arrived_at)
        popped = [rig.queue.pop() for _ in places]
        assert [sequence.request.settings.request_id for sequence in popped if sequence] == ["z", "b", "c", "a", "y"]


@pytest.mark.row(45)
@pytest.mark.parametrize("policy", SchedulingPolicy)
def test_row_45_the_order_survives_skips_and_returns(policy: SchedulingPolicy) -> None:
    """Who was looked at and put back, or preempted, must stand where it stood, whatever came back before it."""
    rig = Rig(policy=policy)
    waiting = [rig.submit(5) for _ in range(6)]
    taken = [rig.queue.pop() for _ in range(4)]
    assert taken == waiting[:4]
    late = rig.submit(5)
    for order in itertools.islice(itertools.permutations(taken), 0, 24, 5):
        rig.queue.put_back([sequence for sequence in order if sequence])
        assert [rig.queue.pop() for _ in range(4)] == waiting[:4]
    rig.queue.put_back(waiting[2:4])
    rig.queue.put_back(waiting[:2])
    assert rig.queue.remove(waiting[1])
    assert [rig.queue.pop() for _ in range(6)] == [waiting[0], *waiting[2:], late]
    assert rig.queue.pop() is None


@pytest.mark.row(45)
@pytest.mark.parametrize("policy", SchedulingPolicy)
def test_row_45_requests_start_in_the_order_of_the_queue(policy: SchedulingPolicy) -> None:
    """The order of the queue is worth nothing if the head is passed over for something that fits."""
    rig = Rig(6, policy=policy)
    big = rig.submit(4 * SIZE, max_tokens=20)
    rig.turn()
    next_big = rig.submit(4 * SIZE, max_tokens=4)
    small = rig.submit(4, max_tokens=4)
    rig.run()
    first_asked = list(dict.fromkeys(rig.asked))
    assert first_asked == [big, next_big, small]
