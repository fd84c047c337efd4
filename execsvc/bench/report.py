"""Measures an engine and writes down what was measured."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import platform
from typing import Any

import torch

from execsvc.bench import ceilings, host_part
from execsvc.bench.workload import Bench, Timing
from execsvc.config import ExecsvcConfig
from execsvc.loading import LoadedModel, choose_device, load

_HOST_BATCH = 256


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """What is to be measured."""

    config: ExecsvcConfig
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prompts: tuple[int, ...]
    """Lengths of prompts to compute, in tokens."""
    steps: int
    """Decode steps that are timed for each batch and context."""


def measure(request: Request, say: Callable[[str], None]) -> dict[str, Any]:
    """Returns one document: environment, ceilings, the host's part, decoding, prompts.

    Raises:
        QuireError: the model cannot be loaded as asked.
    """
    device = choose_device(request.config.device)
    say("measuring the host's part of a step")
    document: dict[str, Any] = {"environment": environment(device), "model": request.config.model}
    document["host_part"] = {"batch": _HOST_BATCH, **host_part.measure(_HOST_BATCH)}
    say("measuring what the device can do at most")
    bandwidth = ceilings.copy_bandwidth(device)
    say(f"loading {request.config.model}")
    loaded = load(request.config)
    flops = ceilings.matmul_rate(device, getattr(torch, loaded.dtype))
    document |= {
        "ceilings": {"copy_bytes_per_second": bandwidth, "matmul_flops": flops},
        "parameters": loaded.parameter_count,
        "dtype": loaded.dtype,
        "kv_dtype": loaded.kv_dtype,
        "budget": dataclasses.asdict(loaded.budget),
    }
    bench = Bench(loaded.engine)
    document["decode"] = []
    for batch in request.batches:
        for context in request.contexts:
            say(f"decoding {batch} x {context} tokens")
            document["decode"].append(_decode(bench, loaded, batch, context, request.steps, bandwidth))
    document["prefill"] = []
    for length in request.prompts:
        say(f"computing a prompt of {length} tokens")
        document["prefill"].append(_prefill(bench, loaded, length, flops))
    return document


def environment(device: torch.device) -> dict[str, Any]:
    """Returns what a figure depends on."""
    found: dict[str, Any] = {
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    try:
        import triton  # noqa: PLC0415 - only to say which
    except ImportError:
        found["triton"] = None
    else:
        found["triton"] = triton.__version__
    if device.type == "cuda":
        found |= {"cuda": torch.version.cuda, "capability": list(torch.cuda.get_device_capability(device))}
    return found


def read_weights(loaded: LoadedModel) -> int:
    """Returns the bytes of weights that a step reads: all but the table of embeddings, of which it reads a few rows."""
    config = loaded.config
    table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    element: torch.dtype = getattr(torch, loaded.dtype)
    return (loaded.parameter_count - table) * element.itemsize


def _decode(
    bench: Bench, loaded: LoadedModel, batch: int, context: int, steps: int, bandwidth: float
) -> dict[str, Any]:
    """Returns the figures of one batch and context."""
    row: dict[str, Any] = {"batch": batch, "context": context}
    warmup = max(2, steps // 4)
    if batch > loaded.max_num_seqs or not bench.fits(batch, context, warmup + steps):
        return row | {"skipped": "does not fit the KV cache or the longest sequence"}
    step, host = bench.decode(batch, context, warmup, steps)
    length = context + warmup + steps // 2
    token_bytes = loaded.budget.bytes_per_block / loaded.budget.block_size
    traffic = read_weights(loaded) + batch * length * token_bytes
    if loaded.device != "cpu":
        # On the CPU the host is the device: all of a step would be its part.
        row["host_us"] = _microseconds(host)
    return row | {
        "step_us": _microseconds(step),
        "tokens_per_second": batch / step.median,
        "bytes_per_step": traffic,
        "share_of_copy_bandwidth": traffic / step.median / bandwidth,
    }


def _prefill(bench: Bench, loaded: LoadedModel, length: int, flops: float) -> dict[str, Any]:
    """Returns the figures of one prompt length."""
    row: dict[str, Any] = {"length": length}
    if not bench.fits(1, length, 1):
        return row | {"skipped": "does not fit the KV cache or the longest sequence"}
    timing = bench.prefill(length, 3)
    config = loaded.config
    # The head is computed for the last token alone; attention sees half of the square.
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    body = loaded.parameter_count - tables
    work = 2 * body * length + 2 * config.num_layers * config.num_heads * config.head_dim * length**2
    return row | {
        "seconds": dataclasses.asdict(timing),
        "tokens_per_second": length / timing.median,
        "share_of_matmul_rate": work / timing.median / flops,
    }


def _microseconds(timing: Timing) -> dict[str, float]:
    return {name: value * 1e6 for name, value in dataclasses.asdict(timing).items()}
