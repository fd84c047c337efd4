"""Engines on the compiled CPU step, and the same model in float32 torch with the same weights and rounded caches."""

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
from kernels.cpu import library, reference
from kernels.cpu.panels import GROUP, Quantised
from kernels.layout import INT8, KVLayout
from tests.native import emulation
from tests.unit.execsvc.tiny import RandomSource, shape_of


def runnable_variants() -> list[str]:
    """Returns the names of the variants that this processor runs; none where nothing was compiled."""
    loaded, _ = library.load()
    return [] if loaded is None else [variant.name for variant in loaded.variants if variant.runs]


def emulated_variants() -> list[str]:
    """Returns the names of those that this processor lacks and that are emulated in tests."""
    return [] if emulation.obstacle() else [name for name in emulation.VARIANTS if not emulation.runs(name)]


def all_variants() -> list[str]:
    """Returns the names of all variants that tests can run, those that this processor runs first."""
    return runnable_variants() + emulated_variants()


class RoundedSource(RandomSource):
    """Random weights that bfloat16 holds exactly."""

    def load(self, name: str) -> torch.Tensor:
        """Returns the tensor of RandomSource, matrices rounded."""
        tensor = super().load(name)
        return tensor if tensor.dim() == 1 else tensor.bfloat16().float()


class FewBitsSource(RandomSource):
    """Random weights whose matrices are in 4 bits, and the head and what leads down in 8, with groups of two sizes."""

    def load_quantised(self, name: str) -> Quantised:
        """Returns a matrix."""
        weight = super().load(name)
        down = "down_proj" in name
        groups = weight.view(len(weight), -1, GROUP // 2 if down else GROUP)
        if down or "lm_head" in name or "embed" in name:
            scales = (groups.abs().amax(-1) / 127).half().float()
            return Quantised((groups / scales[:, :, None]).round().to(torch.int8).flatten(1), scales, None)
        offsets = groups.amin(-1).half().float()
        scales = ((groups.amax(-1) - offsets) / 15).half().float()
        quants = ((groups - offsets[:, :, None]) / scales[:, :, None]).round().clamp(0, 15)
        return Quantised(quants.to(torch.uint8).flatten(1), scales, offsets)

    def load(self, name: str) -> torch.Tensor:
        """Returns what `load_quantised` stands for."""
        return self.load_quantised(name).dequantise() if len(shape_of(self.config, name)) == 2 else super().load(name)


class QuantisedAttention(attention.TorchAttention):
    """Attends in float32 to keys and values that went through 8-bit integers."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See TorchAttention."""
        k, v = (reference.dequantise(*reference.quantise(part)) for part in (k, v))
        return super().attend(layer, q, k, v)


def torch_engine(source: ModelSource, kv_dtype: torch.dtype = torch.bfloat16) -> Engine:
    """Returns an engine that computes in float32, on keys and values rounded as a cache of `kv_dtype` rounds them."""
    config, window = source.config, source.config.sliding_window
    model = llama.load(source, torch.float32, torch.device("cpu"), 1024)
    if kv_dtype == INT8:
        return _engine(lambda cache: Runner(model, QuantisedAttention(cache, window), cache), config, torch.float32)
    return _engine(lambda cache: Runner(model, attention.create("torch", cache, window), cache), config, kv_dtype)


def compiled_engine(
    source: ModelSource,
    variant: str,
    *,
    threads: int = 1,
    blocks: int = 100,
    block_size: int = 16,
    max_model_len: int = 1024,
    swap_slots: int = 0,
    kv_dtype: torch.dtype = torch.bfloat16,
    bits: int | None = None,
    emulated: bool | None = None,
) -> Engine:
    """Returns an engine on a variant of the compiled step, in epoch 1; if None, `emulated` where it must be."""
    if emulated or (emulated is None and variant in emulated_variants()):
        chosen = emulation.variant(variant)
    else:
        found, reason = library.choose(variant)
        assert found is not None, reason
        chosen = found
    model = native.load(source, block_size, max_model_len, chosen, threads, bits=bits, kv_dtype=kv_dtype)
    return _engine(
        lambda cache: NativeRunner(model, cache), source.config, kv_dtype, blocks, block_size, max_model_len, swap_slots
    )


def _engine(
    runner_on: Callable[[KVCache], HostSteps],
    config: ModelConfig,
    kv_dtype: torch.dtype,
    blocks: int = 100,
    block_size: int = 16,
    max_model_len: int = 1024,
    swap_slots: int = 0,
) -> Engine:
    """Returns an engine in epoch 1 on a cache of `kv_dtype`."""
    layout = KVLayout(blocks, config.num_layers, config.num_kv_heads, block_size, config.head_dim, kv_dtype)
    cache = KVCache(layout, torch.device("cpu"))
    limits = {"max_num_seqs": 32, "max_num_batched_tokens": 4096, "max_model_len": max_model_len}
    engine = Engine(runner_on(cache), cache, swap_slot_count=swap_slots, **limits)
    engine.begin_epoch(1)
    return engine
