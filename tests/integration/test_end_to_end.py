"""The demo model streams through three real processes, and its memory adds up."""

from __future__ import annotations

import asyncio
import collections
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import grpc
import pytest

from protos.gateway.v1 import gateway_pb2 as pb
from protos.gateway.v1 import gateway_pb2_grpc
from protos.memsvc.v1 import admin_pb2
from quire.client import AsyncClient, Client
from quire.errors import (
    InvalidRequestError,
    ModelNotFoundError,
    PromptTooLongError,
    QuireError,
    RequestExistsError,
)
from quire.generation import FinishReason
from tests.integration.stack import POOL_ID, Stack, running_stack

GREEDY = {"temperature": 0.0}
SENTENCE = "The history of printing begins with woodblocks, and every page was carved by hand. "


def _text(client: Client, prompt: str, max_tokens: int) -> str:
    return client.generate(prompt, max_tokens=max_tokens, **GREEDY).completions[0].text


def test_a_chat_answer_makes_sense(stack: Stack) -> None:
    """The first thing a user tries must give a sensible answer of the real model."""
    with Client(stack.address) as client:
        answer = client.chat([{"role": "user", "content": "What is the capital of France?"}], max_tokens=30, **GREEDY)
    assert "Paris" in answer.completions[0].text
    assert answer.usage.completion_token_count == len(answer.completions[0].token_ids)


def test_min_tokens_keeps_the_answer_from_ending(stack: Stack) -> None:
    """The model's end must be put off, not written into the answer; a priority that means nothing must be refused."""
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    with Client(stack.address) as client:
        short = client.chat(messages, max_tokens=60, **GREEDY)
        assert short.finish_reason is FinishReason.EOS
        count = len(short.token_ids)
        longer = client.chat(messages, max_tokens=count + 20, min_tokens=count + 10, **GREEDY)
        assert len(longer.token_ids) >= count + 10
        assert longer.token_ids[: count - 1] == short.token_ids[:-1]
        assert short.token_ids[-1] not in longer.token_ids[: count + 10]
        with pytest.raises(InvalidRequestError, match="in order of arrival") as caught:
            client.chat(messages, max_tokens=4, priority=2, **GREEDY)
        assert caught.value.field == "scheduling.priority"


def test_the_block_table_matches_the_tokens_while_streaming(stack: Stack) -> None:
    """An operator who looks at a live sequence must see as many blocks as its tokens need."""
    with Client(stack.address) as client, stack.admin() as admin:
        stream = client.stream(SENTENCE * 4, max_tokens=60, request_id="look-at-me", ignore_eos=True, **GREEDY)
        looked = 0
        for event in stream:
            if type(event).__name__ != "Delta" or looked == 5:
                continue
            looked += 1
            table = admin.GetBlockTable(admin_pb2.GetBlockTableRequest(sequence_id="look-at-me"), timeout=5)
            sequence, size = table.sequence, table.block_size
            assert sequence.written_token_count <= sequence.token_count
            needed = -(-sequence.written_token_count // size)
            # The next block may have been appended for tokens in flight (two steps).
            assert needed <= len(table.entries) <= -(-(sequence.token_count + 2) // size)
            assert [entry.index for entry in table.entries] == list(range(len(table.entries)))
            assert sum(entry.written_token_count for entry in table.entries) == sequence.written_token_count
            assert all(entry.ref_count >= 1 for entry in table.entries)
        assert looked == 5
    stack.wait_idle()
    with stack.admin() as admin, pytest.raises(grpc.RpcError) as caught:
        admin.GetBlockTable(admin_pb2.GetBlockTableRequest(sequence_id="look-at-me"), timeout=5)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_many_streams_at_once_give_what_each_gives_alone(stack: Stack) -> None:
    """Company must not change a single character; afterwards the pool holds nothing but cache."""
    prompts = [f"{SENTENCE * (1 + number % 5)} Number {number}:" for number in range(32)]
    lengths = [4 + (number * 7) % 17 for number in range(32)]
    async with AsyncClient(stack.address) as client:

        async def one(number: int) -> str:
            result = await client.generate(prompts[number], max_tokens=lengths[number], ignore_eos=True, **GREEDY)
            return result.completions[0].text

        together = await asyncio.gather(*(one(number) for number in range(32)))
        pool = stack.wait_idle()
        assert pool.sequence_count == 0
        alone = [await one(number) for number in range(32)]
    assert together == alone
    stack.wait_idle()


async def test_a_shared_system_prompt_is_stored_once(stack: Stack) -> None:
    """Two users of one 600-token system prompt must share its blocks, and the second must not compute them."""
    async with AsyncClient(stack.address) as client:
        system = "You are the librarian. " + SENTENCE * 36
        count = (await client.count_tokens(system)).token_count
        assert count >= 600

        async def start(name: str, question: str) -> object:
            stream = client.stream(system + question, request_id=name, max_tokens=200, ignore_eos=True, **GREEDY)
            async for event in stream:
                if type(event).__name__ == "Delta":
                    break
            return stream

        first = await start("shared-a", "Who wrote this?")
        second = await start("shared-b", "When was it written?")
        with stack.admin() as admin:
            tables = [
                admin.GetBlockTable(admin_pb2.GetBlockTableRequest(sequence_id=name), timeout=5)
                for name in ("shared-a", "shared-b")
            ]
        shared = count // 16
        blocks = [[entry.block_id for entry in table.entries] for table in tables]
        assert blocks[0][:shared] == blocks[1][:shared]
        assert all(entry.ref_count == 2 for entry in tables[1].entries[:shared])
        assert blocks[0][shared:] != blocks[1][shared:]
        assert tables[1].sequence.cached_token_count >= shared * 16
        assert second.admitted.cached_token_count == tables[1].sequence.cached_token_count
        first.close()
        second.close()
    await asyncio.to_thread(stack.wait_idle)


async def test_samples_of_one_request_share_its_prompt(stack: Stack) -> None:
    """N = 3 must compute the prompt once."""
    async with AsyncClient(stack.address) as client:
        result = await client.generate(SENTENCE * 10 + "unique-n", n=3, seed=11, temperature=1.0, max_tokens=12)
        again = await client.generate(SENTENCE * 10 + "unique-n", n=3, seed=11, temperature=1.0, max_tokens=12)
    texts = [completion.text for completion in result.completions]
    assert len(set(texts)) > 1, "every sample draws from its own stream"
    assert texts == [completion.text for completion in again.completions], "the same seed gives the same text"
    stack.wait_idle()


async def test_what_is_reported_of_tokens_fits_them(stack: Stack) -> None:
    """Greedy tokens are the most likely ones, in a completion and where that is the prompt."""
    async with AsyncClient(stack.address) as client:
        plain = await client.generate(SENTENCE, max_tokens=24, logprobs=3, ignore_eos=True, **GREEDY)
        said = plain.completions[0]
        assert [entry.token_id for entry in said.logprobs] == list(said.token_ids)
        assert all(entry.rank == 1 and entry.top[0].token_id == entry.token_id for entry in said.logprobs)
        assert all(entry.top[0].logprob >= entry.top[1].logprob >= entry.top[2].logprob for entry in said.logprobs)
        count = plain.usage.prompt_token_count
        ids = (await client.count_tokens(SENTENCE)).token_ids
        read = await client.generate([*ids, *said.token_ids], max_tokens=1, prompt_logprobs=1, echo=True, **GREEDY)
        assert read.usage.cached_token_count == 0
        for written, entry in zip(said.logprobs, read.prompt_logprobs[count - 1 :], strict=True):
            assert (entry.token_id, entry.rank) == (written.token_id, 1)
            assert abs(entry.logprob - written.logprob) < 1e-4
        assert read.text.startswith(SENTENCE + said.text)
        penalised = await client.generate(SENTENCE, max_tokens=24, repetition_penalty=1.8, ignore_eos=True, **GREEDY)
        assert penalised.token_ids != plain.token_ids
        banned = await client.generate(SENTENCE, max_tokens=1, logit_bias={said.token_ids[0]: -100.0}, **GREEDY)
        assert banned.token_ids[0] == said.logprobs[0].top[1].token_id
        best = await client.generate(SENTENCE, max_tokens=6, n=1, best_of=4, seed=5, stop=["."], logprobs=0)
        assert len(best.completions) == 1
        found = await client.generate(SENTENCE, max_tokens=8, n=2, beam_width=4, ignore_eos=True)
        greedy = await client.generate(SENTENCE, max_tokens=8, logprobs=0, ignore_eos=True, **GREEDY)
        read = await client.generate([*ids, *found.token_ids], max_tokens=1, prompt_logprobs=0, **GREEDY)
        likelihood = sum(entry.logprob for entry in read.prompt_logprobs[count - 1 :])
        assert likelihood >= sum(entry.logprob for entry in greedy.completions[0].logprobs) - 0.02
        assert len(found.completions) == 2 and found.completions[0].text != found.completions[1].text
        schema = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
        schema |= {"required": ["name", "age"], "additionalProperties": False}
        document = await client.generate("A person as JSON: ", guided_json=schema, max_tokens=60, **GREEDY)
        assert set(json.loads(document.text)) == {"name", "age"}
    stack.wait_idle()


async def test_a_chat_of_twenty_turns_computes_only_what_each_turn_adds(stack: Stack) -> None:
    """Otherwise a long conversation costs its square; the answers are those of it as a whole."""
    history: list[dict[str, str]] = []
    async with AsyncClient(stack.address) as client:
        session = await client.create_session()
        said = 0
        for turn in range(20):
            history.append({"role": "user", "content": f"Say the number {turn}."})
            answer = await client.append_chat(session.session_id, history[-1:], max_tokens=8, **GREEDY).result()
            cached = answer.usage.cached_token_count
            assert cached >= max(0, said - 1 - 3), "all but the last token, and less than a quarter of a block"
            said = answer.usage.prompt_token_count + answer.usage.completion_token_count
            history.append({"role": "assistant", "content": answer.text})
        assert (await client.session(session.session_id)).turn_count == 20
        (fork,) = await client.fork_session(session.session_id)
        question = {"role": "user", "content": "What was the first number?"}
        branched = await client.append_chat(fork.session_id, [question], max_tokens=12, **GREEDY).result()
        whole = await client.chat([*history, question], max_tokens=12, **GREEDY)
        assert branched.text == whole.text
        assert len(await client.list_sessions()) == 2
        await client.delete_session(session.session_id)
    stack.wait_idle()


async def test_memory_pressure_changes_no_text(small_stack: Stack) -> None:
    """A pool half the size of the demand must preempt, finish everyone, and change nothing."""
    prompts = [f"{number}. {SENTENCE * 6}" for number in range(8)]
    async with AsyncClient(small_stack.address, timeout=240) as client:

        async def one(prompt: str) -> tuple[str, int]:
            result = await client.generate(prompt, max_tokens=48, ignore_eos=True, **GREEDY)
            return result.completions[0].text, result.usage.preemption_count

        together = await asyncio.gather(*map(one, prompts))
        small_stack.wait_idle()
        alone = [await one(prompt) for prompt in prompts]
    assert [text for text, _ in together] == [text for text, _ in alone]
    assert sum(count for _, count in together) > 0, "the pool was meant to be too small"
    small_stack.wait_idle()


async def test_a_seed_gives_the_same_after_a_restart_in_another_batch_and_when_preempted(
    small_stack: Stack, tmp_path: Path
) -> None:
    """Whoever reports a bad answer with its seed must see it again, whatever the server was doing then."""

    async def one(client: AsyncClient, number: int) -> tuple[list[list[int]], int]:
        prompt = f"{number}. {SENTENCE * 6}"
        result = await client.generate(prompt, max_tokens=48, ignore_eos=True, seed=number, n=2, temperature=1.2)
        return [list(sample.token_ids) for sample in result.completions], result.usage.preemption_count

    async with AsyncClient(small_stack.address, timeout=240) as client:
        together = await asyncio.gather(*(one(client, number) for number in range(6)))
    small_stack.wait_idle()
    assert sum(count for _, count in together) > 0, "the pool was meant to be too small"
    flags = ("--kv-cache-tokens", "4096", "--max-model-len", "1024", "--max-num-batched-tokens", "96")
    for _ in range(2):
        with running_stack(tmp_path, execsvc=flags) as restarted:
            async with AsyncClient(restarted.address, timeout=240) as client:
                for number, (tokens, _) in enumerate(together):
                    assert (await one(client, number))[0] == tokens
    assert len({tuple(sample) for tokens, _ in together for sample in tokens}) == 12, "every sample draws by itself"


def test_a_killed_client_leaves_no_block(stack: Stack) -> None:
    """Kill -9 of a client mid-stream must free its blocks within a moment."""
    script = (
        "import sys, quire\n"
        f"stream = quire.Client({stack.address!r}).stream('Once upon a time', max_tokens=1500, ignore_eos=True,"
        " request_id='doomed')\n"
        "for event in stream: print('event', flush=True)\n"
    )
    client = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert client.stdout is not None
    for _ in range(5):
        assert client.stdout.readline() == b"event\n"
    assert stack.pool().sequence_count == 1
    os.kill(client.pid, signal.SIGKILL)
    client.wait()
    client.stdout.close()
    stack.wait_idle(3.0)
    deadline = time.monotonic() + 3
    while not any(event["request_id"] == "doomed" for event in stack.gateway.events("request_finished")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_cancel_answers_when_the_blocks_are_back(stack: Stack) -> None:
    """After `cancel` a client may rely on the memory being free."""
    with Client(stack.address) as client:
        stream = client.stream("Tell me a story", max_tokens=1500, ignore_eos=True, request_id="cancel-me")
        for _ in zip(range(3), stream, strict=False):
            pass
        answer = client.cancel("cancel-me", "never-seen")
        assert answer.cancelled == ("cancel-me",)
        assert answer.unknown == ("never-seen",)
        assert stream.result().completions[0].finish_reason is FinishReason.CANCELLED
    assert stack.pool().sequence_count == 0
    stack.wait_idle(1.0)


def test_a_deadline_ends_the_request(stack: Stack) -> None:
    """The call's deadline is the request's deadline: nothing goes on after it."""
    with Client(stack.address) as client, pytest.raises(QuireError) as caught:
        client.generate("Count to a million: ", max_tokens=1500, ignore_eos=True, timeout=0.5)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    stack.wait_idle(3.0)


def test_a_stop_string_ends_the_text_before_it(stack: Stack) -> None:
    """A stop string must end the completion and never be part of it, also when it spans tokens."""
    with Client(stack.address) as client:
        whole = _text(client, "1, 2, 3, 4, 5, 6,", 40)
        stop = whole[len(whole) // 3 : len(whole) // 3 + 5]
        result = client.generate("1, 2, 3, 4, 5, 6,", max_tokens=40, stop=[stop], **GREEDY).completions[0]
    assert result.text == whole[: whole.index(stop)]
    assert result.finish_reason is FinishReason.STOP


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"prompt": ""}, InvalidRequestError, "empty"),
        ({"prompt": "word " * 3000}, PromptTooLongError, "max_model_len 2048"),
        ({"max_tokens": 0}, InvalidRequestError, "stopping.max_tokens"),
        ({"max_tokens": 5000}, InvalidRequestError, "stopping.max_tokens"),
        ({"temperature": -1.0}, InvalidRequestError, "sampling.temperature"),
        ({"temperature": float("nan")}, InvalidRequestError, "sampling.temperature"),
        ({"temperature": float("inf")}, InvalidRequestError, "sampling.temperature"),
        ({"top_p": 0.0}, InvalidRequestError, "sampling.top_p"),
        ({"top_p": 1.1}, InvalidRequestError, "sampling.top_p"),
        ({"stop": ["x"] * 17}, InvalidRequestError, "stopping.stop"),
        ({"model": "gpt-17"}, ModelNotFoundError, "gpt-17"),
    ],
)
def test_bad_input_is_refused_by_name(
    stack: Stack, options: dict[str, object], error: type[QuireError], words: str
) -> None:
    """A user must learn which field is wrong and what is allowed, from the client library as well."""
    arguments = {"prompt": "hello", "max_tokens": 4, **options}
    with Client(stack.address) as client, pytest.raises(error) as caught:
        client.generate(**arguments)
    assert words in caught.value.message
    stack.wait_idle(1.0)


def test_a_live_request_id_cannot_be_used_twice(stack: Stack) -> None:
    """A retry of a request that still runs must be refused, so that retries are safe."""
    with Client(stack.address) as client:
        stream = client.stream("hello", max_tokens=500, ignore_eos=True, request_id="twice")
        next(iter(stream))
        with pytest.raises(RequestExistsError):
            client.generate("hello", max_tokens=1, request_id="twice")
        stream.close()
    stack.wait_idle()


def test_malformed_and_oversized_messages_disturb_nobody(stack: Stack) -> None:
    """Garbage on the wire must be INVALID_ARGUMENT, a giant message refused, and a running stream not notice."""
    with Client(stack.address) as client, grpc.insecure_channel(stack.address) as channel:
        stream = client.stream("hello", max_tokens=60, ignore_eos=True, **GREEDY)
        events = iter(stream)
        next(events)
        path = "/quire.gateway.v1.GenerationService/"
        for method, call in (("Generate", channel.unary_unary), ("GenerateStream", channel.unary_stream)):
            rpc = call(path + method, request_serializer=None, response_deserializer=None)
            for payload, code in (
                (b"\xff\xff\xff\xff\x07garbage", grpc.StatusCode.INVALID_ARGUMENT),
                (b"\x00" * (17 * 2**20), grpc.StatusCode.RESOURCE_EXHAUSTED),
            ):
                with pytest.raises(grpc.RpcError) as caught:
                    list(rpc(payload, timeout=10)) if method == "GenerateStream" else rpc(payload, timeout=10)
                assert caught.value.code() is code
        assert stream.result().usage.completion_token_count == 60
    stack.wait_idle()


async def test_ten_thousand_requests_at_once_are_queued_or_refused(small_stack: Stack) -> None:
    """A flood must be answered at once: some are queued, the rest get RESOURCE_EXHAUSTED and a delay."""
    async with grpc.aio.insecure_channel(small_stack.address) as channel:
        stub = gateway_pb2_grpc.GenerationServiceStub(channel)
        spec = pb.GenerationSpec(text="hi", stopping=pb.Stopping(max_tokens=1), sampling=pb.Sampling(temperature=0))
        calls = [stub.Generate(pb.GenerateRequest(spec=spec), timeout=600) for _ in range(10_000)]
        codes = await asyncio.gather(*(call.code() for call in calls))
        answers, expected = collections.Counter(codes), {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
        finished, refused = answers[grpc.StatusCode.OK], answers[grpc.StatusCode.RESOURCE_EXHAUSTED]
        others = {await call.details() for call, code in zip(calls, codes, strict=True) if code not in expected}
        assert answers.keys() <= expected, (answers, others)
        assert finished >= 1024
        assert refused > 0
        index = codes.index(grpc.StatusCode.RESOURCE_EXHAUSTED)
        details = dict(await calls[index].trailing_metadata() or ())
        assert b"google.rpc.RetryInfo" in details["grpc-status-details-bin"]
    async with AsyncClient(small_stack.address) as client:
        assert (await client.generate("still there?", max_tokens=2, **GREEDY)).usage.completion_token_count == 2
    small_stack.wait_idle()


def test_unknown_names_in_admin_calls_are_not_found(stack: Stack) -> None:
    """An operator's typing error must be NOT_FOUND, not an empty answer."""
    with stack.admin() as admin:
        for call, request, code in (
            (admin.GetPool, admin_pb2.GetPoolRequest(pool_id="nope"), grpc.StatusCode.NOT_FOUND),
            (admin.GetBlockTable, admin_pb2.GetBlockTableRequest(sequence_id="nope"), grpc.StatusCode.NOT_FOUND),
            (admin.GetBlock, admin_pb2.GetBlockRequest(pool_id="nope", block_id=1), grpc.StatusCode.NOT_FOUND),
            (admin.GetBlock, admin_pb2.GetBlockRequest(pool_id=POOL_ID, block_id=10**6), grpc.StatusCode.OUT_OF_RANGE),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call(request, timeout=5)
            assert caught.value.code() is code
