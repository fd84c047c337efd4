"""A pool of half the demand: everything ends, and nobody later than by a known number of steps."""

from __future__ import annotations

import random

import pytest

from gateway.core.sequence import Sequence, SequenceState
from quire.units import div_ceil
from tests.conformance.scheduler_rig import SIZE, Rig, preempted

PLACES = 8
COUNT = 200
BUDGET = 64
OVERHEAD = 4
"""Turns around those in which a request is computed: its admission, its fence, and what is in flight before both."""


def steps_alone(sequence: Sequence) -> int:
    """Returns the steps that a request takes which has everything to itself."""
    return div_ceil(sequence.prompt_length, BUDGET) + sequence.length_limit - sequence.prompt_length


@pytest.mark.invariant(13)
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_nobody_ends_later_than_if_all_before_it_and_beside_it_had_been_served_in_turn(seed: int, depth: int) -> None:
    """Whoever gives way must get on though others keep coming: else a long answer starves under load."""
    chance = random.Random(seed)
    shapes = [(chance.randrange(1, 3 * SIZE), chance.randrange(1, 4 * SIZE)) for _ in range(COUNT)]
    needs = [div_ceil(prompt + tokens, SIZE) for prompt, tokens in shapes]
    rig = Rig(PLACES * sum(needs) // COUNT // 2, budget=BUDGET, max_num_seqs=PLACES, depth=depth)
    sequences: list[Sequence] = []
    due: dict[Sequence, int] = {}
    ended: set[Sequence] = set()
    turn = 0
    while len(ended) < COUNT:
        while len(sequences) < COUNT and len(rig.queue) < PLACES:
            prompt, tokens = shapes[len(sequences)]
            sequences.append(rig.submit(prompt, max_tokens=tokens))
            alive = [sequence for sequence in sequences if sequence not in ended]
            beside = [div_ceil(prompt, BUDGET) + tokens for prompt, tokens in shapes[len(sequences) :][:PLACES]]
            due[sequences[-1]] = turn + sum(map(steps_alone, alive)) + sum(beside) + OVERHEAD * (len(alive) + PLACES)
        rig.turn()
        turn += 1
        ended.update(sequence for sequence in sequences if sequence.state is SequenceState.FINISHED)
        for place, sequence in enumerate(sequences):
            assert sequence in ended or turn <= due[sequence], f"request {place}, {shapes[place]}, is due since {turn}"
    assert len(preempted(sequences)) > COUNT // 20, "the pool was meant to be too small"
    for sequence in sequences:
        assert rig.output[sequence] == rig.expected(sequence)
    rig.run()
