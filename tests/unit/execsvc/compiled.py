"""Engines on the compiled CPU step, and the same model in float32 torch with the same bfloat16 weights."""

from __future__ import annotations

from collections.abc import Callable

import torch

from execsvc import attention
from execsvc.engine import Engine
from execsvc.kv_cache import KVCache
from execsvc.model import llama, native
from execsvc.model.config import ModelConfig
from execsvc.model.source import ModelSource
from execsvc.runner import HostSteps, NativeRunner, Runner
from kernels.cpu import library
from kernels.layout import KVLayout
from tests.unit.execsvc.tiny import RandomSource


def runnable_variants() -> list[str]:
    """Returns the names of the variants that this processor runs; none where nothing was compiled."""
    loaded, _ = library.load()
    return [] if loaded is None else [variant.name for variant in loaded.variants if variant.runs]


class RoundedSource(RandomSource):
    """Random weights that bfloat16 holds exactly."""

    def load(self, name: str) -> torch.Tensor:
        """Returns the tensor of RandomSource, matrices rounded."""
        tensor = super().load(name)
        return tensor if tensor.dim() == 1 else tensor.bfloat16().float()


def torch_engine(config: ModelConfig) -> Engine:
    """Returns an engine that computes in float32, on weights, keys and values in bfloat16."""
    model = llama.load(RoundedSource(config), torch.float32, torch.device("cpu"), 1024)
    return _engine(lambda cache: Runner(model, attention.create("torch", cache, config.sliding_window), cache), config)


def compiled_engine(
    source: ModelSource,
    variant: str,
    *,
    threads: int = 1,
    blocks: int = 100,
    block_size: int = 16,
    max_model_len: int = 1024,
) -> Engine:
    """Returns an engine on a variant of the compiled step, in epoch 1."""
    chosen, reason = library.choose(variant)
    assert chosen is not None, reason
    model = native.load(source, block_size, max_model_len, chosen, threads)
    return _engine(lambda cache: NativeRunner(model, cache), source.config, blocks, block_size, max_model_len)


def _engine(
    runner_on: Callable[[KVCache], HostSteps],
    config: ModelConfig,
    blocks: int = 100,
    block_size: int = 16,
    max_model_len: int = 1024,
) -> Engine:
    """Returns an engine in epoch 1 on a cache in bfloat16."""
    layout = KVLayout(blocks, config.num_layers, config.num_kv_heads, block_size, config.head_dim, torch.bfloat16)
    cache = KVCache(layout, torch.device("cpu"))
    limits = {"max_num_seqs": 32, "max_num_batched_tokens": 4096, "max_model_len": max_model_len}
    engine = Engine(runner_on(cache), cache, **limits)
    engine.begin_epoch(1)
    return engine
