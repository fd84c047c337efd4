"""What is answered besides tokens: log-probabilities, the best samples, the prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

import pytest

from gateway.plan import sample_seed
from gateway.streams import RequestStream
from protos.gateway.v1 import gateway_pb2 as pb
from tests.simulation.oracle_executor import expected_logprobs, expected_tokens
from tests.simulation.world import World, ids, running

pytestmark = pytest.mark.usefixtures("both_ways")

PROMPT = [number % 251 + 1 for number in range(45)]


class _Whole(NamedTuple):
    """What a stream has brought."""

    samples: list[pb.Completion]
    prompt: pb.PromptLogprobs | None
    usage: pb.Usage


async def _whole(stream: RequestStream) -> _Whole:
    """Reads a stream; returns the samples that were answered, and what came of the prompt before them."""
    usage = pb.Usage()
    samples: dict[int, pb.Completion] = {}
    texts: dict[int, str] = {}
    prompt = None
    async for event in stream.events():
        usage.MergeFrom(event.finished.usage)
        if event.HasField("prompt_logprobs"):
            assert not samples and prompt is None
            prompt = event.prompt_logprobs
        for delta in event.delta.samples:
            sample = samples.setdefault(delta.index, pb.Completion(index=delta.index))
            sample.token_ids.extend(delta.token_ids)
            sample.logprobs.extend(delta.logprobs)
            texts[delta.index] = texts.get(delta.index, "") + delta.text
    for index, text in texts.items():
        samples[index].text = text
    return _Whole([samples[index] for index in sorted(samples)], prompt, usage)


def _seen(logprobs: Sequence[pb.TokenLogprob]) -> list[tuple[int, float]]:
    return [(entry.rank, entry.logprob) for entry in logprobs]


@pytest.mark.parametrize("pool", [100, 22])
async def test_log_probabilities_come_with_their_tokens_whatever_happens(pool: int) -> None:
    """Siblings, preemption and chunked prompts must neither lose, repeat nor exchange an entry."""
    async with running(World(pool, budget=16, context=256)) as world:

        async def client(number: int) -> int:
            prompt = PROMPT[number:]
            stream = await world.submit(
                token_ids=ids(prompt),
                sampling=pb.Sampling(seed=number, n=3),
                stopping=pb.Stopping(max_tokens=40, ignore_eos=True),
                output=pb.Output(logprobs=2, prompt_logprobs=0),
            )
            samples, prompt_logprobs, usage = await _whole(stream)
            assert prompt_logprobs is not None
            assert [entry.token_id for entry in prompt_logprobs.tokens] == prompt[1:]
            assert _seen(prompt_logprobs.tokens) == expected_logprobs(prompt, 1)
            for index, sample in enumerate(samples):
                assert sample.token_ids == expected_tokens(prompt, sample_seed(number, index), 40, ignore_eos=True)
                assert [entry.token_id for entry in sample.logprobs] == sample.token_ids
                assert _seen(sample.logprobs) == expected_logprobs([*prompt, *sample.token_ids], len(prompt))
                assert all(len(entry.top) == 2 for entry in sample.logprobs)
            return usage.preemption_count

        preemptions = await asyncio.gather(*(client(number) for number in range(4)))
        assert (sum(preemptions) > 0) == (pool == 22)
        await world.settle()


async def test_a_prompt_of_one_token_has_no_log_probabilities_and_says_so() -> None:
    """A client that waits for them before it reads on must not wait for ever."""
    async with running(World(40)) as world:
        stream = await world.submit(
            token_ids=ids([5]), stopping=pb.Stopping(max_tokens=2), output=pb.Output(prompt_logprobs=3)
        )
        samples, prompt, _ = await _whole(stream)
        assert prompt is not None and not prompt.tokens
        assert not samples[0].logprobs
        await world.settle()


async def test_a_cached_prompt_is_computed_again_for_its_log_probabilities() -> None:
    """Otherwise the beginning of a prompt that was seen before has none."""
    async with running(World(40)) as world:
        for _ in range(2):
            stream = await world.submit(
                token_ids=ids(PROMPT), stopping=pb.Stopping(max_tokens=1), output=pb.Output(prompt_logprobs=0)
            )
            _, prompt, _ = await _whole(stream)
            assert prompt is not None and len(prompt.tokens) == len(PROMPT) - 1
            await stream.wait_released()
        await world.settle()


async def test_the_most_likely_samples_are_answered_the_best_first() -> None:
    """`best_of` without its choice would be n samples at the price of more."""
    async with running(World(80)) as world:
        stream = await world.submit(
            token_ids=ids(PROMPT),
            sampling=pb.Sampling(seed=9, n=2, best_of=6),
            stopping=pb.Stopping(max_tokens=12, ignore_eos=True),
        )
        samples, _, _ = await _whole(stream)
        candidates = [expected_tokens(PROMPT, sample_seed(9, index), 12, ignore_eos=True) for index in range(6)]

        def likelihood(tokens: list[int]) -> float:
            return sum(value for _, value in expected_logprobs([*PROMPT, *tokens], len(PROMPT)))

        assert [list(sample.token_ids) for sample in samples] == sorted(candidates, key=likelihood, reverse=True)[:2]
        assert not samples[0].logprobs, "nobody asked for them"
        await world.settle()


async def test_text_may_begin_with_the_prompt_and_end_with_what_ended_it() -> None:
    """`echo` and `include_stop_str_in_output` must change the text alone."""
    async with running(World(40)) as world:
        prompt = list(b"Once upon")
        tokens = expected_tokens(prompt, 2, 30, ignore_eos=True)
        for stop_token in (False, True):
            stopping = pb.Stopping(max_tokens=30, ignore_eos=True, include_stop_str_in_output=True)
            if stop_token:
                stopping.stop_token_ids.append(tokens[6])
            else:
                stopping.max_tokens = 7
            stream = await world.submit(
                token_ids=ids(prompt), sampling=pb.Sampling(seed=2), stopping=stopping, output=pb.Output(echo=True)
            )
            (sample,), _, _ = await _whole(stream)
            token_bytes = world.engine.find_model("").tokenizer.token_bytes
            assert sample.text.startswith(token_bytes.text(prompt))
            decode = token_bytes.decoder()
            said = decode(tokens[:7])
            assert sample.text == token_bytes.text(prompt) + said
        await world.settle()
