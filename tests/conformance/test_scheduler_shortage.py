"""Who gives way in a shortage, and what the blocks that come back are spent on."""

from __future__ import annotations

import pytest

from gateway.core import preemption
from gateway.core.sequence import Sequence, SequenceState
from tests.conformance.scheduler_rig import SIZE, Rig, preempted


def three() -> tuple[Rig, list[Sequence]]:
    """Returns sequences of which the second holds many blocks for few computed tokens, and the last is computed."""
    rig = Rig(64, budget=256, threshold=SIZE)
    sequences = [rig.submit(SIZE), rig.submit(10 * SIZE), rig.submit(SIZE)]
    rig.turn()
    return rig, sequences


@pytest.mark.row(78)
def test_row_78_the_victim_loses_fewest_tokens_for_each_block() -> None:
    """Work that is thrown away for a block is computed again by everybody's leave."""
    rig, (_, cheap, latest) = three()
    assert cheap.admission_no < latest.admission_no
    assert preemption.choose_victim(rig.running(), 8) is cheap


@pytest.mark.row(78)
def test_row_78_what_was_found_in_the_cache_is_not_lost() -> None:
    """Others hold it, or it will be found again: who found much is no dearer than who found nothing."""
    rig = Rig(64, budget=256)
    prefix = [5 + place for place in range(4 * SIZE)]
    first = rig.submit([*prefix, 1])
    rig.turn()
    rig.submit(2 * SIZE - 1)
    sharing = rig.submit([*prefix, *range(900, 900 + SIZE - 1)])
    rig.turn()
    assert sharing.cached_token_count == 4 * SIZE
    assert preemption.choose_victim(rig.running(), 8) is sharing
    assert first.state is SequenceState.RUNNING


@pytest.mark.row(78)
def test_row_78_nobody_gives_way_beyond_the_cap_while_there_is_another() -> None:
    """A request that is the cheapest victim every time would never end."""
    rig, (_, cheap, latest) = three()
    cheap.preemption_count = 8
    assert preemption.choose_victim(rig.running(), 8) is latest
    latest.preemption_count = 9
    assert preemption.choose_victim(rig.running(), 8) in (cheap, latest)


@pytest.mark.row(78)
def test_row_78_the_first_never_gives_way() -> None:
    """Somebody must end for anybody to go on."""
    rig, (first, cheap, latest) = three()
    cheap.preemption_count = latest.preemption_count = 100
    assert preemption.choose_victim(rig.running(), 8) is not first
    assert preemption.choose_victim([first], 8) is None


def crowd() -> tuple[Rig, list[Sequence], list[Sequence]]:
    """Returns eight sequences that filled a pool together, and those of them that gave way."""
    rig = Rig(16, budget=256)
    sequences = [rig.submit(2 * SIZE, max_tokens=3 * SIZE) for _ in range(8)]
    return rig, sequences, rig.turns_until_preempted(*sequences)


@pytest.mark.row(78)
def test_row_78_what_the_preempted_gave_up_is_spent_on_few() -> None:
    """Every block that is taken from who waits is computed twice: one of a few ends as soon as one of all."""
    rig, sequences, victims = crowd()
    assert victims == sequences[-2:]
    rig.turns(4)
    running = [sequence for sequence in sequences if sequence.state is SequenceState.RUNNING]
    assert [len(sequence.blocks) for sequence in running] == [3, 3, 3, 2, 2, 2]
    assert rig.available() + len(rig.scheduler.lease) == 1


@pytest.mark.row(78)
def test_row_78_what_the_ended_gave_back_is_spent_freely() -> None:
    """Nobody hopes to find it: whoever sits out may have it, and all go on as before when nobody waits."""
    rig, sequences, _ = crowd()
    rig.turns(3)
    rig.cancel(sequences[1])
    rig.turns(3)
    running = [sequence for sequence in sequences if sequence.state is SequenceState.RUNNING]
    assert [len(sequence.blocks) for sequence in running] == [3, 3, 3, 3, 3]
    while any(sequence.state in {SequenceState.WAITING, SequenceState.CLOSING} for sequence in sequences[2:]):
        assert rig.scheduler._shortage.lasts
        rig.turn()
    assert not rig.scheduler._shortage.lasts
    assert not all(sequence.state is SequenceState.FINISHED for sequence in preempted(sequences))
    rig.run()
    assert len(preempted(sequences)) >= 2
    for sequence in (sequences[0], *sequences[2:]):
        assert rig.output[sequence] == rig.expected(sequence)
