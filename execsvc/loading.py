"""Brings a model up: weights, KV cache, attention, engine. Slow, synchronous, run in a thread."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import os
import sys
import time

import structlog
import torch

from execsvc import attention, events, memory_profile
from execsvc.config import ExecsvcConfig
from execsvc.engine import Engine
from execsvc.invariance import measure_batch_invariance
from execsvc.kv_cache import KVCache
from execsvc.memory_profile import MemoryBudget
from execsvc.model import llama
from execsvc.model.source import ModelSource, open_model
from execsvc.model.tokenizer import TokenizerFiles
from execsvc.runner import Runner
from kernels.layout import KVLayout
from quire.errors import ConfigError

log = structlog.get_logger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CPU_BATCHED_TOKENS, _CUDA_BATCHED_TOKENS = 512, 8192


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedModel:
    """Everything that runs."""

    name: str
    """Name that requests use."""
    engine: Engine
    tokenizer: TokenizerFiles
    architecture: str
    vocab_size: int
    parameter_count: int
    dtype: str
    device: str
    attention_backend: str
    batch_invariant: bool
    max_num_seqs: int
    max_num_batched_tokens: int
    budget: MemoryBudget


def _default_threads() -> int:
    """Returns how many threads compute: one core is left to gateway and memsvc.

    Threads that wait for each other at every operation lose far more to one busy neighbour than a core is worth
    (two threads on two cores with one of them busy: a fourth of the speed).
    """
    return max(1, len(os.sched_getaffinity(0)) - 1)


def choose_device(name: str) -> torch.device:
    """Returns the device to compute on; "auto" is CUDA where there is one.

    Raises:
        ConfigError: CUDA was asked for and is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for, no CUDA device is there; use --device cpu", field="device")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _choose_dtype(config: ExecsvcConfig, source: ModelSource, device: torch.device) -> torch.dtype:
    """Returns the element type to compute in."""
    if config.dtype != "auto":
        return _DTYPES[config.dtype]
    if device.type == "cpu":
        return torch.float32
    return torch.float16 if source.config.dtype == "float16" else torch.bfloat16


def load(config: ExecsvcConfig, progress: Callable[[float], None] = lambda _: None) -> LoadedModel:
    """Loads the model that the configuration names.

    Args:
        config: the settings.
        progress: told the share of the weights that is loaded, 0 .. 1.

    Raises:
        ModelFormatError, UnsupportedError: the model cannot be loaded.
        ConfigError: a setting does not fit the model or the machine.
    """
    if config.block_size not in {16, 32, 64}:
        raise ConfigError(f"block_size: {config.block_size} is not one of 16, 32, 64", field="block_size")
    torch.set_num_threads(config.num_threads or _default_threads())
    device = choose_device(config.device)
    source = open_model(config.model)
    try:
        return _load_source(config, source, device, progress)
    finally:
        source.close()


def _load_source(
    config: ExecsvcConfig, source: ModelSource, device: torch.device, progress: Callable[[float], None]
) -> LoadedModel:
    """Loads an open model."""
    dtype = _choose_dtype(config, source, device)
    longest = source.config.max_position_embeddings
    max_model_len = config.max_model_len or longest
    if max_model_len > longest:
        raise ConfigError(f"max_model_len: {max_model_len} is more than the model's {longest}", field="max_model_len")
    log.info(events.MODEL_LOADING, path=str(source.path), device=str(device), dtype=_name_of(dtype))
    model = llama.load(source, dtype, device, max_model_len, progress)
    default_tokens = _CPU_BATCHED_TOKENS if device.type == "cpu" else _CUDA_BATCHED_TOKENS
    batched_tokens = config.max_num_batched_tokens or default_tokens
    budget = _budget(config, model, device, dtype, max_model_len, batched_tokens)
    sys.stderr.write(budget.table() + "\n")
    log.info(events.MEMORY_BUDGETED, **dataclasses.asdict(budget))
    cache = KVCache(_layout(model, config.block_size, dtype, budget.block_count), device)
    engine, backend_name = _engine(config, model, cache, max_model_len, batched_tokens)
    invariant = measure_batch_invariance(engine, budget.block_count)
    log.info(events.BATCH_INVARIANCE_MEASURED, batch_invariant=invariant, attention_backend=backend_name)
    log.info(events.MODEL_LOADED, parameter_count=model.parameter_count, weight_bytes=model.weight_bytes)
    return LoadedModel(
        name=config.served_model_name or source.name,
        engine=engine,
        tokenizer=source.tokenizer,
        architecture=model.config.architecture,
        vocab_size=model.config.vocab_size,
        parameter_count=model.parameter_count,
        dtype=_name_of(dtype),
        device="cpu" if device.type == "cpu" else str(device),
        attention_backend=backend_name,
        batch_invariant=invariant,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=batched_tokens,
        budget=budget,
    )


def _engine(
    config: ExecsvcConfig,
    model: llama.Llama,
    cache: KVCache,
    max_model_len: int,
    batched_tokens: int,
    *,
    capture: bool = True,
) -> tuple[Engine, str]:
    """Returns an engine, and the name of what computes attention: Triton's kernels on CUDA, torch elsewhere."""
    limits = {
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": batched_tokens,
        "max_model_len": max_model_len,
    }
    if cache.device.type == "cuda" and config.attention_backend != "torch":
        from execsvc.gpu.steps import gpu_steps  # noqa: PLC0415 - imports triton's kernels

        steps = gpu_steps(model, cache, **limits)
        if capture and not config.enforce_eager:
            started = time.monotonic()
            steps.capture()
            log.info(events.GRAPHS_CAPTURED, size_count=len(steps.sizes), seconds=round(time.monotonic() - started, 1))
        return Engine(steps, cache, **limits), "triton"
    backend = attention.create(config.attention_backend, cache, model.config.sliding_window)
    return Engine(Runner(model, backend, cache), cache, **limits), backend.name


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _layout(model: llama.Llama, block_size: int, dtype: torch.dtype, block_count: int) -> KVLayout:
    """Returns the geometry of the model's KV cache."""
    config = model.config
    return KVLayout(block_count, config.num_layers, config.num_kv_heads, block_size, config.head_dim, dtype)


def _budget(
    config: ExecsvcConfig,
    model: llama.Llama,
    device: torch.device,
    dtype: torch.dtype,
    max_model_len: int,
    batched_tokens: int,
) -> MemoryBudget:
    """Returns the memory budget of the device."""
    sizes = {"kv_cache_bytes": config.kv_cache_byte_count, "kv_cache_tokens": config.kv_cache_tokens}
    layout = _layout(model, config.block_size, dtype, 1)
    if device.type == "cpu":
        return memory_profile.plan_cpu(layout, max_model_len, model.weight_bytes, **sizes)

    def largest_step() -> None:
        _run_largest_step(config, model, device, dtype, max_model_len, batched_tokens)

    return memory_profile.plan_cuda(
        layout, max_model_len, model.weight_bytes, device, config.gpu_memory_utilization, largest_step, **sizes
    )


def _run_largest_step(
    config: ExecsvcConfig,
    model: llama.Llama,
    device: torch.device,
    dtype: torch.dtype,
    max_model_len: int,
    batched_tokens: int,
) -> None:
    """Runs one step of the most tokens and the most samples, on a cache that holds just that."""
    from execsvc.warmup import run_step  # noqa: PLC0415 - only where memory is measured

    length = min(batched_tokens, max_model_len)
    block_count = batched_tokens // config.block_size + batched_tokens // length + 3
    cache = KVCache(_layout(model, config.block_size, dtype, block_count), device)
    engine, _ = _engine(config, model, cache, max_model_len, batched_tokens, capture=False)
    run_step(engine, batched_tokens, min(config.max_num_seqs, batched_tokens), config.block_size)
