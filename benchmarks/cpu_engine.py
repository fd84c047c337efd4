"""What the executor alone does on a CPU: the compiled step beside torch in float32, in alternation.

    python benchmarks/cpu_engine.py [--model smollm2] [--threads N] [--rounds R] [--skip-torch] [--json FILE]
        [--kv-cache-dtype int8_per_token_head] [--only-attention]

With a type of the KV cache the compiled step has its turns with that, too (`compiled_int8`).

Each figure is of steps of an engine: no gateway, no gRPC, no tokenizer; plans, sampling and results included. `median`
and `best` are tokens a second of wall time. `cpu` is tokens a second of the threads' own time, which neighbours on a
shared machine disturb less: with one thread it is what a quiet machine would show, but for shared caches and bandwidth.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
import datetime as dt
import itertools
import json
import os
from pathlib import Path
import platform
import statistics
import time

import numpy as np
import torch

from execsvc import attention
from execsvc.engine import Engine
from execsvc.kv_cache import KVCache
from execsvc.model import llama, native
from execsvc.model.source import open_model
from execsvc.runner import NativeRunner, Runner
from kernels.cpu import library
from kernels.cpu.memory import advise_huge_pages
from kernels.layout import DTYPE_NAMES, INT8, KVLayout
from protos.execsvc.v1 import execsvc_pb2 as pb
from quire import columns

BLOCK_SIZE = 16
CONTEXT, LONG_CONTEXT = 256, 4096
BATCHES = (1, 8, 32, 64)
PROMPT = 512
ATTENDING = 6
"""Sequences that decode at the long context."""
STEPS = 5
"""Steps of one sample."""


def make_engine(model: str, threads: int, dtype: torch.dtype) -> Engine:
    """Returns an engine whose cache has elements of `dtype`: on torch if that is float32, else on the compiled step."""
    source = open_model(model)
    config, cpu = source.config, torch.device("cpu")
    longest = max(LONG_CONTEXT + 208, PROMPT)
    layout = KVLayout(1700, config.num_layers, config.num_kv_heads, BLOCK_SIZE, config.head_dim, dtype)
    cache = KVCache(layout, cpu)
    runner: Runner | NativeRunner
    if dtype != torch.float32:
        variant, reason = library.choose()
        if variant is None:
            raise SystemExit(f"there is no compiled step: {reason}")
        runner = NativeRunner(native.load(source, BLOCK_SIZE, longest, variant, threads, kv_dtype=dtype), cache)
    else:
        runner = Runner(llama.load(source, dtype, cpu, longest), attention.create("torch", cache, 0), cache)
    source.close()
    engine = Engine(runner, cache, max_num_seqs=64, max_num_batched_tokens=PROMPT, max_model_len=longest)
    engine.begin_epoch(1)
    return engine


class Load:
    """Sequences that are decoded, or a prompt that is computed again and again."""

    def __init__(self, engine: Engine, batch: int, context: int) -> None:
        """Opens `batch` sequences of `context` tokens; what their blocks hold does not matter to the time."""
        self._engine = engine
        self._step = 0
        blocks_each = -(-(context + 200) // BLOCK_SIZE)
        order = np.random.default_rng(0).permutation(engine.block_count - 1) + 1
        taken = itertools.cycle(order.tolist())
        self._tables = list(range(1, batch + 1))
        tokens = [(7 * index) % 1000 for index in range(context)]
        added = [
            pb.SequenceStart(
                table=table,
                token_ids=columns.pack(tokens),
                block_ids=columns.pack(itertools.islice(taken, blocks_each)),
                computed_token_count=context - 1,
                sampling=pb.SamplingParams(top_p=1.0),
            )
            for table in self._tables
        ]
        self._apply(pb.StepPlan(added=added))

    def _apply(self, plan: pb.StepPlan) -> None:
        self._step += 1
        plan.epoch, plan.step = 1, self._step
        result = self._engine.apply(plan)
        assert not result.errors, result.errors

    def decode(self) -> None:
        """Computes one token of each sequence."""
        ones = columns.pack([1] * len(self._tables))
        self._apply(pb.StepPlan(scheduled_tables=columns.pack(self._tables), scheduled_counts=ones))

    def close(self) -> None:
        """Drops the sequences."""
        self._engine.drop_all()


def prefill(engine: Engine) -> None:
    """Computes a prompt."""
    blocks = columns.pack(range(1, PROMPT // BLOCK_SIZE + 1))
    start = pb.SequenceStart(
        table=1,
        token_ids=columns.pack([(11 * index) % 1000 for index in range(PROMPT)]),
        block_ids=blocks,
        sampling=pb.SamplingParams(top_p=1.0),
    )
    plan = pb.StepPlan(epoch=1, step=1, added=[start], scheduled_tables=columns.pack([1]))
    plan.scheduled_counts = columns.pack([PROMPT])
    assert not engine.apply(plan).errors
    engine.drop_all()


def sample(work: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Returns (wall, processor) seconds of one call, of the fastest of `repeats`."""
    walls, processors = [], []
    for _ in range(repeats):
        wall, processor = time.perf_counter(), time.process_time()
        work()
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    return min(walls), min(processors)


def decode_times(engine: Engine, batch: int, context: int) -> tuple[float, float]:
    """Returns (wall, processor) seconds of a decode step."""
    load = Load(engine, batch, context)
    load.decode()
    times = sample(load.decode, STEPS)
    load.close()
    return times


def read_bandwidth(threads: int) -> float:
    """Returns bytes a second that a plain read of main memory reaches on `threads` threads, the best of ten."""
    torch.set_num_threads(threads)
    data = torch.ones(2**26)
    advise_huge_pages(data)
    best = min(sample(lambda: torch.dot(data, data), 10)[0] for _ in range(2))
    torch.set_num_threads(1)
    return data.nbytes / best


def attention_turn(engine: Engine, threads: int) -> dict[str, float]:
    """Returns what one turn shows of decode attention: how fast it reads keys and values, beside a plain read."""
    layout = engine._cache.layout  # noqa: SLF001 - a benchmark looks inside
    read = ATTENDING * (LONG_CONTEXT - BLOCK_SIZE) // BLOCK_SIZE * layout.bytes_per_block
    bandwidth = read_bandwidth(threads)
    long, context, short = (decode_times(engine, ATTENDING, length) for length in (LONG_CONTEXT, CONTEXT, BLOCK_SIZE))
    rate = read / (long[0] - short[0])
    return {
        "attention_gb_s": rate / 1e9,
        "read_gb_s": bandwidth / 1e9,
        "share": rate / bandwidth,
        "attention_ms": (long[0] - short[0]) * 1e3,
        "attention_cpu_ms": (long[1] - short[1]) * 1e3,
        f"tokens_per_second_{LONG_CONTEXT}": ATTENDING / long[0],
        f"tokens_per_second_{CONTEXT}": ATTENDING / context[0],
    }


def attention_figures(engines: dict[str, Engine], threads: int, rounds: int) -> dict[str, dict[str, float]]:
    """Returns the medians of `attention_turn` of engines that take turns."""
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, engine in engines.items():
            turns[name].append(attention_turn(engine, threads))
    return {
        name: {figure: round(statistics.median(turn[figure] for turn in found), 3) for figure in found[0]}
        for name, found in turns.items()
    }


def figures(times: list[tuple[float, float]], tokens: int, threads: int) -> dict[str, float]:
    """Returns tokens a second."""
    walls, processors = [wall for wall, _ in times], [processor for _, processor in times]
    return {
        "median": round(tokens / statistics.median(walls), 1),
        "best": round(tokens / min(walls), 1),
        "cpu": round(tokens * threads / statistics.median(processors), 1),
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip-torch", action="store_true")
    parser.add_argument("--only-attention", action="store_true")
    parser.add_argument("--kv-cache-dtype", choices=["auto", DTYPE_NAMES[INT8]], default="auto")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    threads = arguments.threads
    torch.set_num_threads(threads)
    engines = {"compiled": make_engine(arguments.model, threads, torch.bfloat16)}
    if arguments.kv_cache_dtype != "auto":
        engines["compiled_int8"] = make_engine(arguments.model, threads, INT8)
    if not arguments.skip_torch and not arguments.only_attention:
        engines["torch"] = make_engine(arguments.model, threads, torch.float32)
    times: dict[str, dict[str, list[tuple[float, float]]]] = {name: {} for name in engines}
    for _ in range(0 if arguments.only_attention else arguments.rounds):
        for batch in BATCHES:
            for name, engine in engines.items():
                times[name].setdefault(f"decode_{batch}", []).append(decode_times(engine, batch, CONTEXT))
        for name, engine in engines.items():
            times[name].setdefault("prefill", []).append(sample(lambda engine=engine: prefill(engine), 2))
    result: dict[str, object] = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}",
        "variant": str(library.choose()[0].name),  # type: ignore[union-attr]
        "threads": threads,
        "rounds": arguments.rounds,
        "torch_version": torch.__version__,
    }
    for name, by_case in times.items() if not arguments.only_attention else ():
        result[name] = {
            case: figures(found, PROMPT if case == "prefill" else int(case.removeprefix("decode_")), threads)
            for case, found in by_case.items()
        }
    engines.pop("torch", None)
    result["attention_4096"] = attention_figures(engines, threads, max(3, arguments.rounds))
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
