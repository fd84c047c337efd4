"""How many KV blocks fit, and why: the budget is measured, printed, and explained when it does not suffice."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from pathlib import Path

import torch

from kernels.layout import KVLayout
from quire.errors import ConfigError
from quire.units import div_ceil, format_bytes

_CPU_DEFAULT_BYTES = 2**30
_CPU_DEFAULT_SHARE = 0.2
_MAX_BLOCKS = 2**31 - 1


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Where the memory goes. All in bytes unless named otherwise."""

    device: str
    available: int
    """Memory that may be used: on CPU what is free now, on CUDA total * gpu_memory_utilization."""
    weights: int
    activations: int
    """Peak of the largest step beyond the weights; 0 where it was not measured (CPU)."""
    kv_cache: int
    block_count: int
    """The null block included."""
    block_size: int
    bytes_per_block: int
    max_model_len: int
    origin: str
    """Which setting or default decided."""

    @property
    def token_capacity(self) -> int:
        """Tokens that fit into the KV cache at once."""
        return (self.block_count - 1) * self.block_size

    @property
    def max_concurrency(self) -> float:
        """Sequences of max_model_len that fit at once."""
        return (self.block_count - 1) / div_ceil(self.max_model_len, self.block_size)

    def table(self) -> str:
        """Returns the budget for people, a row each."""
        rows = [
            ("device", self.device),
            ("memory available", format_bytes(self.available)),
            ("weights", format_bytes(self.weights)),
            ("activations at the largest step", format_bytes(self.activations) if self.activations else "not measured"),
            ("KV cache", f"{format_bytes(self.kv_cache)} ({self.origin})"),
            ("KV blocks", f"{self.block_count - 1} of {self.block_size} tokens, {format_bytes(self.bytes_per_block)}"),
            ("KV tokens", f"{self.token_capacity}"),
            ("longest sequence", f"{self.max_model_len} tokens; {self.max_concurrency:.1f} of them fit at once"),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(["memory budget", *(f"  {name:<{width}}  {value}" for name, value in rows)])


def available_memory() -> int:
    """Returns the bytes of main memory that can be used now, within the container's limit if there is one."""
    available = None
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    assert available is not None, "the kernel reports MemAvailable"
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text(encoding="ascii").strip()) != "max":
        available = min(available, max(0, int(text) - int(used.read_text(encoding="ascii"))))
    return available


def plan_cpu(
    layout: KVLayout, max_model_len: int, weights: int, *, kv_cache_bytes: int | None, kv_cache_tokens: int | None
) -> MemoryBudget:
    """Returns the budget on main memory.

    Args:
        layout: geometry of a block; its block_count is not looked at.
        max_model_len: longest sequence in tokens.
        weights: bytes that they take (they are loaded already).
        kv_cache_bytes: the KV cache's size, if it was set.
        kv_cache_tokens: the same in tokens; goes before the bytes.

    Raises:
        ConfigError: not enough for one sequence of max_model_len, or more than there is.
    """
    available = available_memory()
    if kv_cache_tokens is not None:
        wanted, origin = _bytes_of_tokens(layout, kv_cache_tokens), "kv_cache_tokens"
    elif kv_cache_bytes is not None:
        wanted, origin = kv_cache_bytes, "kv_cache_bytes"
    else:
        wanted, origin = min(_CPU_DEFAULT_BYTES, int(available * _CPU_DEFAULT_SHARE)), "default"
    return _fit(layout, max_model_len, "cpu", available, weights, 0, wanted, origin)


def plan_cuda(
    layout: KVLayout,
    max_model_len: int,
    weights: int,
    device: torch.device,
    utilization: float,
    largest_step: Callable[[], None],
    *,
    kv_cache_bytes: int | None,
    kv_cache_tokens: int | None,
) -> MemoryBudget:
    """Returns the budget on a CUDA device, after running the largest step once to measure its peak.

    Args:
        layout: geometry of a block; its block_count is not looked at.
        max_model_len: longest sequence in tokens.
        weights: bytes that they take (they are loaded already).
        device: the CUDA device.
        utilization: share of the device's memory that may be used, other processes' share included.
        largest_step: runs a step of max_num_batched_tokens on a small cache of its own.
        kv_cache_bytes: the KV cache's size, if it was set.
        kv_cache_tokens: the same in tokens; goes before the bytes.

    Raises:
        ConfigError: not enough for one sequence of max_model_len, or more than there is.
    """
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    largest_step()
    torch.cuda.synchronize(device)
    activations = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    # What this process does not hold is held by neighbours or by the driver: it counts against the share.
    others = total - free - torch.cuda.memory_reserved(device)
    available = int(total * utilization) - others
    room = available - torch.cuda.memory_allocated(device) - activations
    if kv_cache_tokens is not None:
        wanted, origin = _bytes_of_tokens(layout, kv_cache_tokens), "kv_cache_tokens"
    elif kv_cache_bytes is not None:
        wanted, origin = kv_cache_bytes, "kv_cache_bytes"
    else:
        wanted, origin = room, f"gpu_memory_utilization {utilization:g}"
    return _fit(
        layout, max_model_len, str(device), min(available, free), weights, activations, wanted, origin, room=room
    )


def _bytes_of_tokens(layout: KVLayout, tokens: int) -> int:
    """Returns the bytes of blocks for `tokens`, and of the null block."""
    return (div_ceil(tokens, layout.block_size) + 1) * layout.bytes_per_block


def _fit(
    layout: KVLayout,
    max_model_len: int,
    device: str,
    available: int,
    weights: int,
    activations: int,
    wanted: int,
    origin: str,
    *,
    room: int | None = None,
) -> MemoryBudget:
    """Returns the budget for a KV cache of `wanted` bytes; raises ConfigError if that cannot be."""
    room = available if room is None else room
    block_count = min(max(wanted, 0) // layout.bytes_per_block, _MAX_BLOCKS)
    if wanted > room and block_count > 0:
        raise ConfigError(
            f"{origin}: a KV cache of {format_bytes(wanted)} was asked for, {format_bytes(max(room, 0))} are there",
            field=origin.split(maxsplit=1)[0],
        )
    feasible = max(0, block_count - 1) * layout.block_size
    if feasible < max_model_len:
        needed = _bytes_of_tokens(layout, max_model_len)
        advice = f"set max_model_len to {feasible} or less, or give the cache" if feasible else "give the cache"
        raise ConfigError(
            f"max_model_len: one sequence of {max_model_len} tokens needs a KV cache of {format_bytes(needed)}, "
            f"{format_bytes(max(wanted, 0))} are there ({origin}): {advice} {format_bytes(needed)}",
            field="max_model_len",
            metadata={"feasible_max_model_len": feasible, "needed_bytes": needed, "available_bytes": max(wanted, 0)},
        )
    return MemoryBudget(
        device=device,
        available=available,
        weights=weights,
        activations=activations,
        kv_cache=block_count * layout.bytes_per_block,
        block_count=block_count,
        block_size=layout.block_size,
        bytes_per_block=layout.bytes_per_block,
        max_model_len=max_model_len,
        origin=origin,
    )
