"""How a sample ends: each end with its own reason, and nothing behind it."""

from __future__ import annotations

import pytest

from gateway.core.stopping import Stop, stop_by_length, stop_by_token
from protos.gateway.v1 import gateway_pb2 as pb
from tests.conformance.scheduler_rig import CONTEXT, SIZE, Rig
from tests.simulation.oracle_executor import EOS_TOKEN, expected_tokens
from tests.simulation.test_gateway import World, running

PROMPT = list(range(1, 41))


@pytest.mark.row(50)
@pytest.mark.parametrize("depth", [1, 3])
def test_row_50_nothing_follows_a_stop(depth: int) -> None:
    """Steps that were in flight when a sample ended go on; what they sample must reach nobody."""
    rig = Rig(depth=depth)
    sequences = [rig.submit(SIZE + place, stop_at=3 + 2 * place) for place in range(4)]
    other = rig.submit(SIZE, max_tokens=40)
    rig.run()
    for place, sequence in enumerate(sequences):
        assert rig.output[sequence] == rig.expected(sequence)[: 3 + 2 * place]
        assert list(sequence.tokens[sequence.prompt_length :]) == rig.output[sequence]
        assert stop_by_token(sequence) is Stop.STOP_TOKEN
    assert rig.output[other] == rig.expected(other)
    assert (len(rig.output[other]), stop_by_length(other)) == (40, Stop.LENGTH)


@pytest.mark.row(50)
def test_row_50_the_longest_sequence_ends_with_its_own_reason() -> None:
    """A client that is told "length" asks for more tokens; of the longest sequence there are no more to have."""
    rig = Rig(budget=CONTEXT, depth=2)
    full, asked = rig.submit(CONTEXT - 5), rig.submit(CONTEXT - 5, max_tokens=4)
    rig.run()
    assert (stop_by_length(full), stop_by_length(asked)) == (Stop.CONTEXT, Stop.LENGTH)
    assert (len(rig.output[full]), len(rig.output[asked])) == (5, 4)


@pytest.mark.row(50)
@pytest.mark.parametrize("preempting", [False, True])
def test_row_50_min_tokens_puts_stops_off(preempting: bool) -> None:
    """An answer that must have some length neither ends before nor goes on behind an end, preempted or not."""
    rig = Rig(6 if preempting else 64, depth=2)
    others = [rig.submit(SIZE - 2, max_tokens=30) for _ in range(4)]
    patient = rig.submit(SIZE, stop_at=3, min_tokens=9, max_tokens=48)
    rig.run()
    settings = patient.request.settings
    withheld = settings.stop_token_ids
    produced = rig.output[patient]
    whole = expected_tokens(
        list(settings.prompt), settings.sampling.seed, 48, ignore_eos=True, withheld=withheld, min_tokens=9
    )
    assert withheld.isdisjoint(produced[:9])
    assert produced == whole[: len(produced)]
    assert len(produced) == 48 or produced[-1] in withheld
    assert bool(patient.preemption_count + sum(other.preemption_count for other in others)) == preempting
    # An executor that does not withhold them must not make the answer shorter either.
    at_once = Rig().submit(SIZE, stop_at=1, min_tokens=2)
    for expected in (None, None, Stop.STOP_TOKEN):
        at_once.tokens.append(min(at_once.request.settings.stop_token_ids))
        assert stop_by_token(at_once) is expected


async def ending(world: World, stopping: pb.Stopping, seed: int) -> tuple[list[int], str, pb.Ending]:
    """Returns tokens, text and ending of a request."""
    stream = await world.submit(token_ids=pb.TokenIds(ids=PROMPT), sampling=pb.Sampling(seed=seed), stopping=stopping)
    tokens: list[int] = []
    text, last = "", pb.Ending()
    async for event in stream.events():
        for sample in event.delta.samples:
            tokens.extend(sample.token_ids)
            text += sample.text
            if sample.HasField("ending"):
                last = sample.ending
    return tokens, text, last


@pytest.mark.row(50)
async def test_row_50_every_end_has_its_own_reason() -> None:
    """A client decides by the reason whether the answer is whole, cut, or to be gone on with."""
    seed = next(seed for seed in range(1000) if 3 < len(expected_tokens(PROMPT, seed, 60)) < 40)
    whole = expected_tokens(PROMPT, seed, 60)
    assert whole[-1] == EOS_TOKEN
    free = expected_tokens(PROMPT, seed, 60, ignore_eos=True)
    async with running(World(64)) as world:
        tokens, spoken, end = await ending(world, pb.Stopping(max_tokens=60), seed)
        assert (tokens, end.reason) == (whole, pb.FINISH_REASON_EOS)
        tokens, _, end = await ending(world, pb.Stopping(max_tokens=60, ignore_eos=True), seed)
        assert (tokens, end.reason) == (free, pb.FINISH_REASON_LENGTH)
        tokens, _, end = await ending(world, pb.Stopping(max_tokens=60, stop_token_ids=[whole[1]]), seed)
        assert (tokens, end.reason, end.token_id) == (whole[:2], pb.FINISH_REASON_STOP, whole[1])
        letter = next(character for character in spoken if character.isascii())
        tokens, text, end = await ending(world, pb.Stopping(max_tokens=60, stop=[letter]), seed)
        assert (end.reason, end.stop_string) == (pb.FINISH_REASON_STOP, letter)
        assert tokens == whole[: len(tokens)] != whole
        assert text == spoken[: spoken.index(letter)]
        tokens, _, end = await ending(world, pb.Stopping(ignore_eos=True, max_tokens=512 - len(PROMPT)), seed)
        assert (len(tokens), end.reason) == (512 - len(PROMPT), pb.FINISH_REASON_CONTEXT)
        await world.settle()


@pytest.mark.row(50)
async def test_row_50_min_tokens_defers_every_kind_of_stop() -> None:
    """The end of the sequence, a stop token and a stop string: none of them may make the answer too short."""
    seed = next(seed for seed in range(1000) if 3 < len(expected_tokens(PROMPT, seed, 60)) < 40)
    free = expected_tokens(PROMPT, seed, 60)
    async with running(World(64)) as world:
        _, spoken, _ = await ending(world, pb.Stopping(max_tokens=60), seed)
        letter = next(character for character in spoken if character.isascii())
        patient = pb.Stopping(max_tokens=60, min_tokens=50, stop_token_ids=[free[1]], stop=[letter])
        tokens, _, end = await ending(world, patient, seed)
        expected = expected_tokens(PROMPT, seed, 60, ignore_eos=True, withheld={EOS_TOKEN, free[1]}, min_tokens=50)
        assert tokens == expected[: len(tokens)]
        assert len(tokens) > 50 or (len(tokens), end.reason) == (60, pb.FINISH_REASON_LENGTH)
        patient.min_tokens = 0
        assert len((await ending(world, patient, seed))[0]) < 40
        await world.settle()


@pytest.mark.parametrize("depth", [2, 3])
def test_a_stop_that_nobody_foresaw_wastes_a_token_for_each_further_step_in_flight_and_shows_none(depth: int) -> None:
    """The next step is under way before the last one's tokens are known; a stop must cost that, and not be seen."""
    rig = Rig(64, depth=depth)
    sequences = [rig.submit(20 + number, max_tokens=100, stop_at=5 + number) for number in range(4)]
    rig.run()
    needed = sum(20 + number + 5 + number - 1 for number in range(4))
    for number, sequence in enumerate(sequences):
        assert rig.output[sequence] == rig.expected(sequence)[: 5 + number]
    assert needed < rig.executor.computed_token_count <= needed + (depth - 1) * len(sequences)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_an_end_by_length_wastes_nothing(depth: int) -> None:
    """It is known beforehand, so no step may plan beyond it."""
    rig = Rig(64, depth=depth)
    for number in range(4):
        rig.submit(20 + number, max_tokens=5 + number)
    rig.run()
    assert rig.executor.computed_token_count == sum(20 + number + 5 + number - 1 for number in range(4))
