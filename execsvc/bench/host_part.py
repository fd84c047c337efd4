"""The host's part of a decode step: everything that `execsvc` does on a CPU, with nothing behind it.

Launches do nothing here: graphs are not replayed, kernels are not called, copies go from main memory to main memory.
What is left, from the bytes of a plan to the bytes of its result, is how long a GPU must be kept busy meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
import statistics
import time
from typing import Any

import torch

from execsvc.engine import Engine
from execsvc.gpu.decoder import Decoder
from execsvc.gpu.operations import TorchOperations
from execsvc.gpu.runtime import EagerRuntime, Graph
from execsvc.gpu.sampling import TorchSampler
from execsvc.gpu.steps import GpuSteps
from execsvc.kv_cache import KVCache
from execsvc.model import llama
from execsvc.model.config import ModelConfig, RopeConfig
from execsvc.model.dummy import DummySource
from execsvc.prefix_tree import GroupRules
from kernels.layout import KVLayout
from kernels.paged_attention.group_columns import GroupColumns
from protos.execsvc.v1 import execsvc_pb2 as pb
from quire import columns

BLOCK_SIZE = 16
_CONTEXT = 512
_WARMUP_STEPS, _STEPS = 64, 320
_SHARED_BLOCKS = 16
_MEMBERS = 16
_CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=64,
    hidden_size=16,
    intermediate_size=16,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=16,
    max_position_embeddings=_CONTEXT + _WARMUP_STEPS + _STEPS + BLOCK_SIZE,
    rms_norm_eps=1e-5,
    rope=RopeConfig(10_000.0),
    tie_word_embeddings=True,
)
_BLOCKS_EACH = _CONFIG.max_position_embeddings // BLOCK_SIZE


class _NullGraph:
    """A graph that does nothing."""

    def replay(self) -> None:
        """Does nothing."""


class NullRuntime(EagerRuntime):
    """A device that does nothing."""

    def capture(self, work: Callable[[], None]) -> Graph:  # noqa: ARG002 - nothing is captured
        """Returns a graph of nothing."""
        return _NullGraph()


class NullOperations(TorchOperations):
    """Operations of which a replayed step calls one: to change the state. It does nothing."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.apply_writes = lambda state, offsets, values: None  # noqa: ARG005 - the protocol's names


def measure(sequence_count: int) -> dict[str, float]:
    """Returns microseconds of one decode step of `sequence_count` sequences, a sixteenth of which take a block.

    All of them begin with the same blocks, so that a step has a group.

    `median_us`, `low_us` and `high_us` (the middle eight tenths) of: parse the plan, apply it, launch, take the tokens,
    make the result.
    """
    engine = _engine(sequence_count)
    table_ids = list(range(1, sequence_count + 1))
    plan = pb.StepPlan(step=1, epoch=1)
    lengths = {table: _CONTEXT + table % BLOCK_SIZE for table in table_ids}
    for table, length in lengths.items():
        plan.added.add(
            table=table,
            token_ids=columns.pack([1] * length),
            block_ids=columns.pack(_blocks(table, length // BLOCK_SIZE + 1)),
            computed_token_count=length - 1,
            sampling=pb.SamplingParams(top_p=1.0),
        )
    engine.apply(plan)
    scheduled, ones = columns.pack(table_ids), columns.pack([1] * sequence_count)
    samples: list[float] = []
    for step in range(2, _WARMUP_STEPS + _STEPS):
        appended: list[int] = []
        for table, length in lengths.items():
            lengths[table] = length + 1
            if (length + 1) % BLOCK_SIZE == 0 and (length + 1) // BLOCK_SIZE < _BLOCKS_EACH:
                appended += (table, (length + 1) // BLOCK_SIZE, _first_block(table) + (length + 1) // BLOCK_SIZE)
        plan = pb.StepPlan(
            step=step, epoch=1, appended=columns.pack(appended), scheduled_tables=scheduled, scheduled_counts=ones
        )
        data = plan.SerializeToString()
        started = time.perf_counter_ns()
        pending = engine.submit(pb.StepPlan.FromString(data))
        pending.wait()
        engine.collect(pending).SerializeToString()
        samples.append((time.perf_counter_ns() - started) / 1000)
    deciles = statistics.quantiles(samples[_WARMUP_STEPS:], n=10)
    return {"median_us": statistics.median(samples[_WARMUP_STEPS:]), "low_us": deciles[0], "high_us": deciles[-1]}


def _first_block(table: int) -> int:
    """Returns where the blocks of a table would begin if it shared none."""
    return _SHARED_BLOCKS + 1 + (table - 1) * _BLOCKS_EACH


def _blocks(table: int, count: int) -> list[int]:
    """Returns the first blocks of a table."""
    own = range(_first_block(table) + _SHARED_BLOCKS, _first_block(table) + count)
    return [*range(1, _SHARED_BLOCKS + 1), *own]


@torch.inference_mode()
def _engine(sequence_count: int) -> Engine:
    """Returns an engine on a device that does nothing."""
    runtime = NullRuntime()
    source = DummySource(Path("null"), "null", _CONFIG, None, 0, runtime.device, torch.float32)
    model = llama.load(source, torch.float32, runtime.device, _CONFIG.max_position_embeddings)
    block_count = _first_block(sequence_count + 1)
    layout = KVLayout(block_count, 1, 1, BLOCK_SIZE, _CONFIG.head_dim, torch.float32)
    cache = KVCache(layout, runtime.device)
    limits = {
        "max_num_seqs": sequence_count,
        "max_num_batched_tokens": sequence_count,
        "max_model_len": _CONFIG.max_position_embeddings,
    }
    groups = GroupColumns.allocate(1, sequence_count, runtime.device)
    rules = GroupRules(_MEMBERS, BLOCK_SIZE, BLOCK_SIZE)
    decoder = Decoder(model, NullOperations(cache, model.rotary, 1, 0, groups, rules))
    steps = GpuSteps(decoder, cache, TorchSampler(), runtime, **limits)
    steps.capture()
    engine = Engine(steps, cache, **limits)
    engine.begin_epoch(1)
    return engine
