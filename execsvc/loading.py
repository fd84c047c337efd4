"""Brings a model up: weights, KV cache, attention, engine. Slow, synchronous, run in a thread."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import os
from typing import Final

import structlog
import torch

from execsvc import attention, events
from execsvc.assembly import Assembly
from execsvc.config import ExecsvcConfig
from execsvc.engine import Engine
from execsvc.gpu.kv_scales import KVScales
from execsvc.grammars import Grammars
from execsvc.invariance import measure_batch_invariance
from execsvc.memory_profile import MemoryBudget
from execsvc.model import llama, native
from execsvc.model.config import ModelConfig
from execsvc.model.dummy import open_dummy
from execsvc.model.generation import SamplingDefaults, sampling_defaults
from execsvc.model.native import NativeModel
from execsvc.model.source import ModelSource, open_model
from execsvc.model.tokenizer import TokenizerFiles
from execsvc.numa import stay_on_one_node
from kernels.cpu.library import SLOW, Variant
from kernels.layout import DTYPE_NAMES, INT8
from quire.errors import ConfigError

log = structlog.get_logger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FP8, _FP8_CAPABILITY = "fp8_e4m3", (8, 9)
_CPU_BATCHED_TOKENS, _CUDA_BATCHED_TOKENS = 512, 8192
_QUANTIZATION_BITS: Final[dict[str, int | None]] = {"none": None, "int8": 8, "int4": 4}


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedModel:
    """Everything that runs."""

    name: str
    """Name that requests use."""
    engine: Engine
    tokenizer: TokenizerFiles | None
    """None where weights are dummies and no tokenizer lies beside the configuration."""
    sampling_defaults: SamplingDefaults
    config: ModelConfig
    architecture: str
    vocab_size: int
    parameter_count: int
    dtype: str
    kv_dtype: str
    device: str
    attention_backend: str
    batch_invariant: bool
    max_num_seqs: int
    max_num_batched_tokens: int
    budget: MemoryBudget
    swap_rates: tuple[int, int] = (0, 0)
    """Bytes a second that blocks are swapped out and in with; 0 without host memory for it."""


def _cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def _torch_threads() -> int:
    """Returns how many threads torch computes on: one core is left to gateway and memsvc.

    Threads that wait for each other at every operation lose far more to one busy neighbour than a core is worth
    (two threads on two cores with one of them busy: a fourth of the speed).
    """
    return max(1, _cores() - 1)


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


def _choose_variant(config: ExecsvcConfig, source: ModelSource, device: torch.device) -> Variant | None:
    """Returns the variant of the compiled CPU step to use, or None if torch computes; says on a CPU which it is.

    Raises:
        ConfigError: the compiled step was asked for by name and cannot compute this.
    """
    wanted = config.attention_backend == attention.NATIVE
    if device.type != "cpu" or config.attention_backend not in {"auto", attention.NATIVE}:
        variant, reason = None, f"device {device.type}, attention_backend {config.attention_backend}"
    elif config.dtype not in {"auto", "bfloat16"}:
        variant, reason = None, f"it computes in bfloat16, not in {config.dtype}"
    else:
        variant, reason = native.choose_variant(source.config, config.block_size)
    if wanted and variant is None:
        raise ConfigError(f"attention_backend: native cannot be used: {reason}", field="attention_backend")
    if variant is not None and variant.name in SLOW and config.dtype == "auto" and not wanted:
        reason, variant = f"only its variant {variant.name} runs here, torch in float32 is faster", None
    if device.type == "cpu":
        log.info(events.CPU_STEP_CHOSEN, step=variant.name if variant else "torch", reason=reason)
    return variant


def _choose_dtype(
    config: ExecsvcConfig, source: ModelSource, device: torch.device, variant: Variant | None
) -> torch.dtype:
    """Returns the element type to compute in."""
    if variant is not None:
        return torch.bfloat16
    if config.dtype != "auto":
        return _DTYPES[config.dtype]
    if device.type == "cpu":
        return torch.float32
    return torch.float16 if source.config.dtype == "float16" else torch.bfloat16


def _choose_kv_dtype(
    config: ExecsvcConfig, dtype: torch.dtype, device: torch.device, variant: Variant | None
) -> torch.dtype:
    """Returns the element type of the KV cache; raises ConfigError where there are no kernels for it."""
    wanted, here = config.kv_cache_dtype, f"this is {device} with --attention-backend {config.attention_backend}"
    if config.calculate_kv_scales and wanted != _FP8:
        raise ConfigError(
            f"calculate_kv_scales: found with kv_cache_dtype {wanted}; only a float8 cache has scales to calculate: "
            f"use it with --kv-cache-dtype {_FP8}",
            field="calculate_kv_scales",
        )
    if wanted == "auto":
        return dtype
    if wanted == DTYPE_NAMES[INT8]:
        if variant is None:
            allowed = f"auto or {_FP8}" if device.type == "cuda" else "auto (cpu_step_chosen in the log says why)"
            raise ConfigError(
                f"kv_cache_dtype: {wanted} needs the compiled step on a CPU; {here}, where allowed is {allowed}",
                field="kv_cache_dtype",
            )
        return INT8
    if device.type != "cuda" or config.attention_backend == "torch":
        advice = f"; the compiled step here has {DTYPE_NAMES[INT8]}" if variant is not None else ""
        raise ConfigError(
            f"kv_cache_dtype: {wanted} needs the Triton kernels on a CUDA device; {here}{advice}",
            field="kv_cache_dtype",
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < _FP8_CAPABILITY:
        raise ConfigError(
            f"kv_cache_dtype: {config.kv_cache_dtype} needs compute capability 8.9, {device} has "
            f"{capability[0]}.{capability[1]}",
            field="kv_cache_dtype",
        )
    return torch.float8_e4m3fn


def _choose_scales(config: ExecsvcConfig, model: llama.Llama | NativeModel, engine: Engine) -> None:
    """Says by what a float8 cache's keys and values are divided, and has it measured if that was asked for."""
    assert isinstance(model, llama.Llama), "the compiled CPU step has no float8 cache"
    if config.calculate_kv_scales:
        engine.calculate_kv_scales()
        log.info(events.KV_SCALES_CHOSEN, origin="first prompt", advice="they are logged when there was one")
        return
    log.info(events.KV_SCALES_CHOSEN, **KVScales(model.config.num_layers, model.kv_scales).described())


def _dummy_dtype(config: ExecsvcConfig, device: torch.device) -> torch.dtype:
    """Returns the type in which dummy weights are made: half of float32's bytes where a GPU converts them anyway."""
    if config.dtype != "auto":
        return _DTYPES[config.dtype]
    return torch.float32 if device.type == "cpu" else torch.bfloat16


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
    device = choose_device(config.device)
    if device.type == "cpu":
        stay_on_one_node(config.num_threads)
    torch.set_num_threads(config.num_threads or _torch_threads())
    source: ModelSource
    if config.load_format == "dummy":
        source = open_dummy(config.model, config.seed, device, _dummy_dtype(config, device))
    else:
        source = open_model(config.model)
    try:
        return _load_source(config, source, device, progress)
    finally:
        source.close()


def _load_source(
    config: ExecsvcConfig, source: ModelSource, device: torch.device, progress: Callable[[float], None]
) -> LoadedModel:
    """Loads an open model."""
    variant = _choose_variant(config, source, device)
    dtype = _choose_dtype(config, source, device, variant)
    longest = source.config.max_position_embeddings
    max_model_len = config.max_model_len or longest
    if max_model_len > longest:
        raise ConfigError(f"max_model_len: {max_model_len} is more than the model's {longest}", field="max_model_len")
    defaults = sampling_defaults(source, config.generation_config, config.override_generation_config)
    kv_dtype = _choose_kv_dtype(config, dtype, device, variant)
    types = {"dtype": _name_of(dtype), "kv_dtype": DTYPE_NAMES[kv_dtype]}
    log.info(events.MODEL_LOADING, path=str(source.path), device=str(device), **types)
    model: llama.Llama | NativeModel
    if variant is None and config.quantization != "none":
        raise ConfigError(
            f"quantization: {config.quantization} needs the compiled step on a CPU; this is {device} with "
            f"--attention-backend {config.attention_backend} and --dtype {config.dtype}, where allowed is none",
            field="quantization",
        )
    if variant is None:
        model = llama.load(source, dtype, device, max_model_len, progress)
    else:
        # Its threads wait for no one of them that is held up: with all cores the services beside it lose it less than a
        # core is worth (ADR 0011).
        threads = config.num_threads or _cores()
        bits = _QUANTIZATION_BITS[config.quantization]
        model = native.load(
            source, config.block_size, max_model_len, variant, threads, progress, bits=bits, kv_dtype=kv_dtype
        )
    default_tokens = _CPU_BATCHED_TOKENS if device.type == "cpu" else _CUDA_BATCHED_TOKENS
    batched_tokens = config.max_num_batched_tokens or default_tokens
    assembled = Assembly(config, model, device, kv_dtype, max_model_len, batched_tokens).assemble()
    engine, budget, backend_name = assembled.engine, assembled.budget, assembled.attention_backend
    if (tokenizer := source.tokenizer) is not None:
        engine.grammars = Grammars(tokenizer.json, model.config.vocab_size, tokenizer.eos_token_ids)
    invariant = measure_batch_invariance(engine, budget.block_count)
    log.info(events.BATCH_INVARIANCE_MEASURED, batch_invariant=invariant, attention_backend=backend_name)
    swap_rates = engine.measure_swap()
    if kv_dtype == torch.float8_e4m3fn:
        _choose_scales(config, model, engine)
    if engine.swap_slot_count:
        out, back = swap_rates
        log.info(
            events.SWAP_MEASURED, slot_count=engine.swap_slot_count, out_bytes_per_second=out, in_bytes_per_second=back
        )
    log.info(events.MODEL_LOADED, parameter_count=model.parameter_count, weight_bytes=model.weight_bytes)
    if named := defaults.named():
        log.info(events.SAMPLING_DEFAULTS, **named)
    return LoadedModel(
        name=config.served_model_name or source.name,
        engine=engine,
        tokenizer=source.tokenizer,
        sampling_defaults=defaults,
        config=model.config,
        architecture=model.config.architecture,
        vocab_size=model.config.vocab_size,
        parameter_count=model.parameter_count,
        **types,
        device="cpu" if device.type == "cpu" else str(device),
        attention_backend=backend_name,
        batch_invariant=invariant,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=batched_tokens,
        budget=budget,
        swap_rates=swap_rates,
    )


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
