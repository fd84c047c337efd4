"""A load is sent when it is due, and its report says what clients saw."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
import contextlib
import http.server
import json
import math
from pathlib import Path
import subprocess
import sys
import threading

import numpy as np
import pytest

from gateway.bench.null_stack import NullStack
from gateway.bench.serve import plot
from gateway.bench.serve.backends import OpenAIBackend, QuireBackend
from gateway.bench.serve.load import Counts, Pace, Result, prompt_tokens, run_load
from gateway.bench.serve.record import Record
from gateway.bench.serve.report import build_document, parse_objectives
from gateway.bench.serve.watch import PoolSample, PoolWatch
from gateway.simulate.workload import Workload, draw
from quire.errors import ConfigError, NotReadyError


class Echo:
    """An endpoint that answers after some turns of the loop, and knows how many requests were under way."""

    model, vocab_size, max_model_len = "echo", 100, 64

    def __init__(self) -> None:
        self.running = 0
        self.most = 0

    async def open(self) -> None:
        """Has nothing to open."""

    async def close(self) -> None:
        """Has nothing to close."""

    async def generate(self, record: Record, prompt: list[int], max_tokens: int, clock: Callable[[], float]) -> None:
        """Answers with `max_tokens` tokens in two messages."""
        assert len(prompt) == record.prompt_token_count
        self.running += 1
        self.most = max(self.most, self.running)
        for count in (1, max_tokens - 1):
            await asyncio.sleep(0.001)
            record.token_times.append(clock())
            record.token_count += count
        self.running -= 1
        record.ended_at = clock()


async def test_no_more_requests_are_under_way_than_allowed_and_all_are_sent() -> None:
    """A closed loop that is open measures overload; one that forgets requests measures nothing."""
    backend, heard = Echo(), []
    result = await run_load(backend, draw("fixed:10,5", 40, 0), Pace(concurrency=3), heard.append)
    assert backend.most == 3
    assert [record.token_count for record in result.records] == [5] * 40
    assert (heard[-1].done, heard[-1].total, heard[-1].running) == (40, 40, 0)
    assert isinstance(heard[-1], Counts)


async def test_what_does_not_fit_the_model_is_counted_and_not_sent() -> None:
    """Refusals that were known beforehand would count as the server's."""
    lengths = np.array([10, 60, 10])
    workload = Workload("w", lengths, np.array([5, 5, 5]), np.zeros(3))
    result = await run_load(Echo(), workload, Pace())
    assert ([record.index for record in result.records], result.skipped_count) == ([0, 2], 1)


def test_requests_are_due_at_random_times_of_the_rate_or_at_those_of_the_trace() -> None:
    """Arrivals at even times never queue, and flatter whoever is measured."""
    workload = draw("fixed:1,1", 4000, 0)
    due = Pace(rate=50.0, seed=1).times(workload)
    gaps = np.diff(due)
    assert due[0] == 0.0
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.1)
    # Of an exponential distribution the deviation is the mean; a gamma of shape 4 has half of it.
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)
    even = np.diff(Pace(rate=50.0, burstiness=4.0, seed=1).times(workload))
    assert even.std() == pytest.approx(even.mean() / 2, rel=0.1)
    assert not Pace(rate=math.inf).times(workload).any()
    trace = Workload("t", np.ones(3), np.ones(3), np.array([0.0, 2.0, 7.0]))
    assert Pace(replay=True).times(trace).tolist() == [0.0, 2.0, 7.0]


def test_prompts_share_what_the_trace_says_and_nothing_else() -> None:
    """Hits that the workload does not have would be the cache's praise."""
    lengths = np.full(2, 1024)
    ids = [np.array([1, 2]), np.array([1, 3])]
    workload = Workload("t", lengths, np.ones(2), np.zeros(2), ids)
    first, second = (prompt_tokens(workload, index, 50_000) for index in range(2))
    assert first[:512] == second[:512]
    assert first[512:] != second[512:]
    drawn = draw("fixed:64,1", 300, 0)
    heads = {tuple(prompt_tokens(drawn, index, 256)[:16]) for index in range(300)}
    assert len(heads) == 300


def records() -> list[Record]:
    """Returns two good requests, one of them fast, and one that was refused."""
    fast = Record(0, 100, 0.0, 1.0, token_times=[0.1, 0.5, 0.9], token_count=3, cached_token_count=50)
    slow = Record(1, 100, 0.0, 4.0, token_times=[2.0, 4.0], token_count=3, recomputed_token_count=40)
    refused = Record(2, 100, 1.0, 1.004, "QUEUE_FULL")
    return [fast, slow, refused]


def test_the_report_counts_waits_objectives_refusals_and_what_was_computed_twice() -> None:
    """Whoever buys machines by these figures must be able to trust each of them."""
    samples = [PoolSample(0.0, 0.2, 4, 0, 1), PoolSample(4.0, 0.6, 12, 3, 2)]
    document = build_document(Result(records(), 4.0, 0.002, 1), samples, {"ttft": 500.0, "tpot": 450.0}, {})
    assert (document["sent"], document["completed"], document["failures"]) == (3, 2, {"QUEUE_FULL": 1})
    assert document["ttft_ms"]["p50"] == 1050.0
    assert document["tpot_ms"]["max"] == 1000.0
    assert document["itl_ms"]["max"] == 2000.0
    assert document["refusal_ms"]["max"] == pytest.approx(4.0)
    assert (document["goodput_requests_per_s"], document["goodput_share"]) == (0.25, 0.333333)
    # 50 + 2 and 100 + 2 + 40 tokens were computed.
    assert document["recompute_tax"] == pytest.approx(40 / 194, abs=1e-6)
    assert document["kv_utilization"] == {"mean": 0.4, "max": 0.6}
    columns = document["timeline"]
    assert columns["running"][-1] == 0
    assert sum(columns["tokens_per_s"]) * 4.0 / len(columns["at_s"]) == pytest.approx(6)
    assert columns["kv_utilization"][-1] == 0.6


def test_a_report_without_a_single_answer_is_a_report() -> None:
    """The worst result of all is the one that must be seen."""
    document = build_document(Result([Record(0, 1, 0.0, 0.1, "UNAVAILABLE")], 0.1, 0.0, 0), [], {"ttft": 1.0}, {})
    assert (document["ttft_ms"], document["goodput_share"], document["recompute_tax"]) == ({}, 0.0, 0.0)


@pytest.mark.parametrize("text", ["ttft", "ttft:-1", "itl:5", "ttft:fast"])
def test_an_objective_that_means_nothing_is_refused(text: str) -> None:
    """Every request would meet it."""
    with pytest.raises(ConfigError, match="expected NAME:MILLISECONDS"):
        parse_objectives([text])


class _Completions(http.server.BaseHTTPRequestHandler):
    """Streams three pieces, and refuses a prompt of one token."""

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        """Lists the model."""
        self._answer(200, json.dumps({"data": [{"id": "m", "max_model_len": 32}]}).encode())

    def do_POST(self) -> None:
        """Completes."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if len(body["prompt"]) == 1:
            return self._answer(429, b"{}")
        events = [{"choices": [{"text": text}]} for text in ("a", "", "b")]
        usage = {"completion_tokens": body["max_tokens"], "prompt_tokens_details": {"cached_tokens": 2}}
        events.append({"choices": [], "usage": usage})
        lines = [f"data: {json.dumps(event)}\n\n".encode() for event in events]
        return self._answer(200, b"".join(lines) + b"data: [DONE]\n\n")

    def _answer(self, code: int, data: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextlib.contextmanager
def completions() -> Iterator[str]:
    """Serves OpenAI's completions at an address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Completions) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


async def test_a_server_with_openai_completions_is_measured_alike() -> None:
    """A comparison with a peer is worth nothing if the peer is asked for something else."""
    with completions() as url:
        backend = OpenAIBackend(url, "", 100, 4, ignore_eos=True)
        await backend.open()
        assert (backend.model, backend.max_model_len) == ("m", 32)
        workload = Workload("w", np.array([4, 1]), np.array([7, 7]), np.zeros(2))
        result = await run_load(backend, workload, Pace(concurrency=1))
        await backend.close()
    answered, refused = result.records
    assert (answered.token_count, len(answered.token_times), answered.cached_token_count) == (7, 2, 2)
    assert (refused.failure, refused.token_count) == ("HTTP_429", 0)
    with pytest.raises(ConfigError, match="expected http://HOST:PORT"):
        OpenAIBackend("https://h:1", "", 1, 1, ignore_eos=True)


async def test_a_server_that_is_not_there_is_named() -> None:
    """What grpc says of an address where nothing listens is no help to whoever typed it."""
    backend, watch = QuireBackend("127.0.0.1:1", "", ignore_eos=True), PoolWatch("127.0.0.1:1")
    try:
        for look in (backend.open, lambda: watch.look(0.0)):
            with pytest.raises(NotReadyError, match=r"nothing answers at 127\.0\.0\.1:1$"):
                await look()
    finally:
        await backend.close()
        await watch.close()


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    """A column that the picture needs must be in the report."""
    path = tmp_path / "load.svg"
    document = build_document(Result(records(), 4.0, 0.0, 0), [PoolSample(0.0, 0.2, 4, 0, 1)], {}, {})
    plot.draw(document, str(path))
    assert "<svg" in path.read_text()


async def test_an_overloaded_gateway_refuses_with_a_reason_and_serves_the_others() -> None:
    """The command, the load and a whole gateway over gRPC must agree on what happened."""
    stack = NullStack(4, 0.002, block_count=200, gateway_flags=("--max-queue-size", "8"))
    try:
        await stack.start()
        command = [sys.executable, "-m", "quire.cli.main", "bench", "serve", "--address", stack.address]
        command += ["--memsvc", stack.memsvc_address, "--distribution", "fixed:40,250", "--num-prompts", "60", "--json"]
        # Half a second at least: the pools are looked at four times in one.
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    finally:
        await stack.close()
    document = json.loads(done.stdout)
    assert set(document["failures"]) == {"QUEUE_FULL"}
    assert document["completed"] + document["failures"]["QUEUE_FULL"] == 60
    assert document["output_tokens"] == 250 * document["completed"]
    assert document["refusal_ms"]["max"] > 0
    assert 0 < document["kv_utilization"]["max"] <= 1
