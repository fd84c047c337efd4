"""Bad input gets an error that names the field, what was found and what is allowed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from gateway.models import ServedModel
from gateway.sampling_options import default_sampling
from gateway.tokenize import ModelTokenizer
from gateway.validation import check_spec, encode_prompt
from protos.execsvc.v1 import execsvc_pb2
from protos.gateway.v1 import gateway_pb2 as pb
from quire.errors import InvalidRequestError, PromptTooLongError
from tests.simulation.oracle_executor import tokenizer_files

MODEL = ServedModel(
    name="m",
    architecture="Oracle",
    vocab_size=256,
    max_model_len=100,
    pool_token_count=64,
    eos_token_ids=frozenset({0}),
    tokenizer=ModelTokenizer(tokenizer_files(), add_bos_token=False),
    executor_ids=("e",),
)
PROMPT = {"token_ids": pb.TokenIds(ids=[1, 2, 3])}


async def _check(**fields: Any) -> Any:
    spec = pb.GenerationSpec(**fields)
    return await check_spec(spec, MODEL, max_tokens_default=16, max_queue_time=5.0, caching=True)


def _queue_time(nanoseconds: int) -> pb.Scheduling:
    scheduling = pb.Scheduling()
    scheduling.max_queue_time.FromNanoseconds(nanoseconds)
    return scheduling


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({}, "prompt", "none given"),
        ({"text": ""}, "text", "empty"),
        ({"token_ids": pb.TokenIds()}, "token_ids", "empty"),
        ({"token_ids": pb.TokenIds(ids=[256])}, "token_ids.ids", "0 .. 255"),
        ({"chat": pb.Chat()}, "chat.messages", "0 messages"),
        ({"chat": pb.Chat(messages=[pb.ChatMessage(role="root", content="x")])}, "chat.messages[0].role", "'root'"),
        ({"chat": pb.Chat(messages=[pb.ChatMessage(role="user", content="x")])}, "chat", "no chat template"),
        ({**PROMPT, "request_id": "a b"}, "request_id", "1 .. 128 characters"),
        ({**PROMPT, "request_id": "a" * 129}, "request_id", "1 .. 128 characters"),
        ({**PROMPT, "sampling": pb.Sampling(temperature=-0.1)}, "sampling.temperature", "0 (greedy) .. 100"),
        ({**PROMPT, "sampling": pb.Sampling(temperature=float("nan"))}, "sampling.temperature", "nan"),
        ({**PROMPT, "sampling": pb.Sampling(temperature=float("inf"))}, "sampling.temperature", "inf"),
        ({**PROMPT, "sampling": pb.Sampling(top_p=0.0)}, "sampling.top_p", "greater than 0"),
        ({**PROMPT, "sampling": pb.Sampling(top_p=1.5)}, "sampling.top_p", "at most 1"),
        ({**PROMPT, "sampling": pb.Sampling(top_p=float("nan"))}, "sampling.top_p", "nan"),
        ({**PROMPT, "sampling": pb.Sampling(min_p=2.0)}, "sampling.min_p", "0 .. 1"),
        ({**PROMPT, "sampling": pb.Sampling(n=0)}, "sampling.n", "1 .. 64"),
        ({**PROMPT, "sampling": pb.Sampling(n=65)}, "sampling.n", "1 .. 64"),
        ({**PROMPT, "sampling": pb.Sampling(typical_p=0.0)}, "sampling.typical_p", "greater than 0"),
        ({**PROMPT, "sampling": pb.Sampling(repetition_penalty=0.0)}, "sampling.repetition_penalty", "greater than 0"),
        ({**PROMPT, "sampling": pb.Sampling(presence_penalty=2.5)}, "sampling.presence_penalty", "-2 .. 2"),
        ({**PROMPT, "sampling": pb.Sampling(frequency_penalty=float("nan"))}, "sampling.frequency_penalty", "nan"),
        ({**PROMPT, "sampling": pb.Sampling(logit_bias={256: 1.0})}, "sampling.logit_bias", "tokens 0 .. 255"),
        ({**PROMPT, "sampling": pb.Sampling(logit_bias={7: 101.0})}, "sampling.logit_bias[7]", "-100 .. 100"),
        ({**PROMPT, "sampling": pb.Sampling(n=3, best_of=2)}, "sampling.best_of", "3 (n) .. 64"),
        ({**PROMPT, "sampling": pb.Sampling(best_of=65)}, "sampling.best_of", "1 (n) .. 64"),
        ({**PROMPT, "output": pb.Output(logprobs=21)}, "output.logprobs", "0 .. 20"),
        ({**PROMPT, "output": pb.Output(prompt_logprobs=21)}, "output.prompt_logprobs", "0 .. 20"),
        ({**PROMPT, "stopping": pb.Stopping(max_tokens=0)}, "stopping.max_tokens", "1 .. 61"),
        ({**PROMPT, "stopping": pb.Stopping(max_tokens=62)}, "stopping.max_tokens", "1 .. 61"),
        ({**PROMPT, "stopping": pb.Stopping(stop=["x"] * 17)}, "stopping.stop", "at most 16"),
        ({**PROMPT, "stopping": pb.Stopping(stop=["x", ""])}, "stopping.stop[1]", "0 characters"),
        ({**PROMPT, "stopping": pb.Stopping(stop=["x" * 257])}, "stopping.stop[0]", "257 characters"),
        ({**PROMPT, "stopping": pb.Stopping(stop_token_ids=[1] * 65)}, "stopping.stop_token_ids", "at most 64"),
        ({**PROMPT, "stopping": pb.Stopping(stop_token_ids=[256])}, "stopping.stop_token_ids[0]", "0 .. 255"),
        ({**PROMPT, "caching": pb.Caching(salt="s" * 257)}, "caching.salt", "at most 256"),
        ({**PROMPT, "scheduling": _queue_time(0)}, "scheduling.max_queue_time", "more than 0"),
        ({**PROMPT, "scheduling": pb.Scheduling(priority=-1)}, "scheduling.priority", "in order of arrival"),
        ({**PROMPT, "stopping": pb.Stopping(min_tokens=17)}, "stopping.min_tokens", "0 .. 16 (max_tokens)"),
        ({**PROMPT, "stopping": pb.Stopping(max_tokens=4, min_tokens=5)}, "stopping.min_tokens", "0 .. 4"),
    ],
)
async def test_a_field_out_of_range_is_named(fields: dict[str, Any], field: str, words: str) -> None:
    """The user must be able to correct the request from the message alone."""
    with pytest.raises(InvalidRequestError) as caught:
        await _check(**fields)
    assert caught.value.field == field
    assert words in caught.value.message


@pytest.mark.parametrize(("length", "words"), [(64, "64 tokens, the whole pool holds 64"), (100, "at most 99")])
async def test_a_prompt_that_can_never_run_is_refused_with_both_numbers(length: int, words: str) -> None:
    """A prompt larger than the pool or the context must fail at once, with what it needs and what there is."""
    with pytest.raises(PromptTooLongError, match=words) as caught:
        await _check(token_ids=pb.TokenIds(ids=[1] * length))
    assert caught.value.metadata == {
        "prompt_token_count": str(length),
        "max_model_len": "100",
        "pool_token_count": "64",
    }


async def test_text_that_no_context_could_hold_is_refused_before_it_is_tokenised() -> None:
    """A megabyte of text must not cost the gateway seconds of tokenising."""
    with pytest.raises(PromptTooLongError, match="characters"):
        await _check(text="x" * (100 * 256 + 1))


async def test_defaults_are_those_that_the_api_documents() -> None:
    """A request that says nothing gets temperature 1, one sample, and as many tokens as fit up to the default."""
    settings = await _check(**PROMPT)
    assert (settings.sampling.temperature, settings.sampling.top_p, settings.sampling.top_k) == (1.0, 1.0, 0)
    assert (settings.sample_count, settings.max_tokens, settings.max_queue_time) == (1, 16, 5.0)
    assert len(settings.request_id) == 16
    assert (await _check(**PROMPT)).sampling.seed != settings.sampling.seed


async def test_priorities_are_taken_where_the_gateway_goes_by_them() -> None:
    """A priority of either sign must arrive, and none must mean the middle."""
    for scheduling, expected in (
        (pb.Scheduling(), 0),
        (pb.Scheduling(priority=-7), -7),
        (pb.Scheduling(priority=3), 3),
    ):
        spec = pb.GenerationSpec(**PROMPT, scheduling=scheduling)
        settings = await check_spec(
            spec, MODEL, max_tokens_default=16, max_queue_time=5.0, caching=True, priorities=True
        )
        assert settings.priority == expected


async def test_the_ends_that_a_request_knows_are_those_of_the_model_and_its_own() -> None:
    """A request that ignores the model's end must still end at its own stop tokens."""
    stopping = pb.Stopping(stop_token_ids=[9, 4], min_tokens=3)
    settings = await _check(**PROMPT, stopping=stopping)
    assert (settings.eos_token_ids, settings.stop_token_ids, settings.min_tokens) == ({0}, {4, 9}, 3)
    stopping.ignore_eos = True
    assert (await _check(**PROMPT, stopping=stopping)).eos_token_ids == frozenset()


async def test_zero_temperature_means_greedy_and_is_not_the_default() -> None:
    """An explicit zero must be kept apart from a field that is not set."""
    assert (await _check(**PROMPT, sampling=pb.Sampling(temperature=0.0))).sampling.temperature == 0.0


async def test_count_tokens_sees_what_generation_sees() -> None:
    """A client that counts first must get the number that it is charged for."""
    counted = await encode_prompt(pb.CountTokensRequest(text="héllo"), MODEL)
    assert list(counted) == list((await _check(text="héllo")).prompt)


@pytest.mark.asyncio
async def test_what_a_model_has_as_defaults_holds_where_a_request_does_not_say() -> None:
    """A field that is set goes before it, also where it is set to what is usual."""
    described = execsvc_pb2.DefaultSampling(temperature=0.5, top_k=7, min_p=0.25, max_tokens=9)
    model = dataclasses.replace(MODEL, default_sampling=default_sampling(described), default_max_tokens=9)

    async def check(**sampling: Any) -> Any:
        spec = pb.GenerationSpec(**PROMPT, sampling=pb.Sampling(**sampling))
        return await check_spec(spec, model, max_tokens_default=16, max_queue_time=5.0, caching=True)

    silent = await check()
    assert (silent.sampling.temperature, silent.sampling.top_k, silent.sampling.min_p) == (0.5, 7, 0.25)
    assert (silent.sampling.top_p, silent.max_tokens) == (1.0, 9)
    said = await check(temperature=0.0, top_k=0, top_p=0.5)
    assert (said.sampling.temperature, said.sampling.top_k, said.sampling.top_p) == (0.0, 0, 0.5)
    assert said.sampling.min_p == 0.25
    search = await check(beam_width=2)
    assert (search.sampling.top_k, search.sampling.min_p) == (0, 0.0)
    assert not MODEL.default_sampling.ListFields()
