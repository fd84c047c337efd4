"""Beam search on the whole gateway: what it finds, whatever happens to its beams."""

from __future__ import annotations

import asyncio
import random

import pytest

from gateway.core.beam import BeamSearch, BeamSettings
from gateway.streams import RequestStream
from protos.gateway.v1 import gateway_pb2 as pb
from quire.errors import InvalidRequestError
from tests.simulation.oracle_executor import EOS_TOKEN, digest_of, likely_tokens
from tests.simulation.world import World, ids, running

pytestmark = pytest.mark.usefixtures("both_ways")

PROMPT = [number % 251 + 1 for number in range(90)]


def expected(prompt: list[int], settings: BeamSettings, max_tokens: int, count: int, ends: set[int]) -> list[list[int]]:
    """Returns what a search must find."""
    digest = b""
    for token in prompt:
        digest = digest_of(digest, token)
    search = BeamSearch(settings, ends, max_tokens)
    beams, wanted = [digest], settings.candidate_count(len(ends))
    while not search.done:
        going = search.advance([likely_tokens(beam, wanted) for beam in beams])
        beams = [digest_of(beams[beam], token) for beam, token in going]
    return [list(hypothesis.tokens) for hypothesis in search.best(count)]


async def _found(stream: RequestStream) -> list[list[int]]:
    samples: dict[int, list[int]] = {}
    async for event in stream.events():
        for sample in event.delta.samples:
            assert sample.HasField("ending")
            samples[sample.index] = list(sample.token_ids)
    return [samples[index] for index in sorted(samples)]


@pytest.mark.parametrize(("pool", "max_num_seqs"), [(24, 256), (12, 256), (64, 2), (64, 1)])
async def test_searches_that_wait_for_each_others_room_all_end(pool: int, max_num_seqs: int) -> None:
    """A beam is held until the others of its search have come as far: who holds must give way to who waits."""
    async with running(World(pool, budget=32, context=128, max_num_seqs=max_num_seqs)) as world:

        async def client(number: int) -> None:
            prompt = PROMPT[number : number + 35 + 3 * number]
            stream = await world.submit(
                token_ids=ids(prompt),
                sampling=pb.Sampling(beam_width=4, n=4),
                stopping=pb.Stopping(max_tokens=8, ignore_eos=True),
            )
            assert await _found(stream) == expected(prompt, BeamSettings(4), 8, 4, set())

        await asyncio.gather(*(client(number) for number in range(6)))
        await world.settle()


@pytest.mark.parametrize("prompt_length", [1, 16, 37])
@pytest.mark.parametrize("width", [1, 4])
async def test_a_search_finds_what_its_rules_say_and_computes_each_token_once(prompt_length: int, width: int) -> None:
    """Otherwise a beam reads what another one wrote, or each step costs its whole beams."""
    async with running(World(64)) as world:
        prompt = PROMPT[:prompt_length]
        for ignore_eos in (True, False):
            before = world.executor.computed_token_count
            stream = await world.submit(
                token_ids=ids(prompt),
                sampling=pb.Sampling(beam_width=width, n=width),
                stopping=pb.Stopping(max_tokens=20, ignore_eos=ignore_eos),
            )
            ends = set() if ignore_eos else {EOS_TOKEN}
            assert await _found(stream) == expected(prompt, BeamSettings(width), 20, width, ends)
            await stream.wait_released()
            if ignore_eos:
                assert world.executor.computed_token_count - before == prompt_length + width * 19
        await world.settle()


@pytest.mark.parametrize("seed", range(3))
async def test_searches_survive_pressure_a_lost_executor_and_cancellation(seed: int) -> None:
    """Whatever happens to a beam, the search finds the same, and nothing is left."""
    async with running(World(40, seed=seed)) as world:
        chance = random.Random(seed)
        world.executor.fail_at_step = 25

        async def client(number: int) -> None:
            await asyncio.sleep(chance.random() * 0.02)
            prompt = PROMPT[number : number + chance.randrange(1, 60)]
            settings = BeamSettings(chance.randrange(2, 6), chance.choice((0.5, 1.0)), chance.random() < 0.5)
            stream = await world.submit(
                request_id=f"r{number}",
                token_ids=ids(prompt),
                sampling=pb.Sampling(
                    beam_width=settings.width,
                    length_penalty=settings.length_penalty,
                    early_stopping=settings.early_stopping,
                ),
                stopping=pb.Stopping(max_tokens=30),
            )
            if number % 5 == 4:
                await asyncio.sleep(0.02)
                await world.engine.cancel(f"r{number}")
                return
            assert await _found(stream) == expected(prompt, settings, 30, 1, {EOS_TOKEN})

        await asyncio.gather(*(client(number) for number in range(10)))
        await world.settle()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"sampling": pb.Sampling(beam_width=0)}, "sampling.beam_width"),
        ({"sampling": pb.Sampling(beam_width=11)}, "sampling.beam_width"),
        ({"sampling": pb.Sampling(beam_width=2, n=3)}, "sampling.beam_width"),
        ({"sampling": pb.Sampling(beam_width=2, temperature=0.5)}, "sampling.temperature"),
        ({"sampling": pb.Sampling(beam_width=2, length_penalty=11)}, "sampling.length_penalty"),
        ({"sampling": pb.Sampling(length_penalty=2)}, "sampling.length_penalty"),
        ({"sampling": pb.Sampling(beam_width=2), "stopping": pb.Stopping(stop=["x"])}, "stopping.stop"),
        ({"sampling": pb.Sampling(beam_width=2), "output": pb.Output(logprobs=1)}, "output.logprobs"),
        ({"sampling": pb.Sampling(beam_width=2), "constraint": pb.Constraint(regex="x")}, "constraint"),
    ],
)
async def test_what_a_search_cannot_do_is_refused_by_name(fields: dict[str, object], field: str) -> None:
    """An option that would have no effect must not look as if it had."""
    async with running(World(20)) as world:
        with pytest.raises(InvalidRequestError) as caught:
            await world.submit(token_ids=ids([1]), **fields)
        assert caught.value.field == field
