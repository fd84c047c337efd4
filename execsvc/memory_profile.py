"""How many KV blocks fit, and why: the budget is measured, printed, and explained when it does not suffice."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from pathlib import Path
from typing import TypeVar

import structlog
import torch

from execsvc import events
from execsvc.gpu.device_memory import DeviceMemory
from kernels.layout import KVLayout
from quire.errors import ConfigError
from quire.units import div_ceil, format_bytes

log = structlog.get_logger(__name__)

_CPU_DEFAULT_BYTES = 2**30
_CPU_DEFAULT_SHARE = 0.2
_MAX_BLOCKS = 2**31 - 1
_SHRINK = 0.97
"""Share of a KV cache that is tried next when the memory for it was gone after all."""
_ATTEMPTS = 16

Cache = TypeVar("Cache")


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Where the memory goes. All in bytes unless named otherwise."""

    device: str
    available: int
    """Memory that may be used: on CPU what is free now, on CUDA total * gpu_memory_utilization."""
    weights: int
    activations: int
    """Peak of the largest step beyond the weights; 0 where it was not measured (CPU)."""
    graphs: int
    """What captured graphs and the state on the device take; 0 where there are none."""
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
    def left(self) -> int:
        """Bytes of the share that nothing is planned for."""
        return max(0, self.available - self.weights - self.activations - self.graphs - self.kv_cache)

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
            *([("graphs and state", format_bytes(self.graphs))] if self.graphs else []),
            ("KV cache", f"{format_bytes(self.kv_cache)} ({self.origin})"),
            ("left", format_bytes(self.left)),
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
    layout: KVLayout, max_model_len: int, weights: int, *, kv_cache_size: float | None, kv_cache_tokens: int | None
) -> MemoryBudget:
    """Returns the budget on main memory.

    Args:
        layout: geometry of a block; its block_count is not looked at.
        max_model_len: longest sequence in tokens.
        weights: bytes that they take (they are loaded already).
        kv_cache_size: the KV cache's size, if it was set: bytes, or below 1 a share of the memory that is free now.
        kv_cache_tokens: the same in tokens; goes before the size.

    Raises:
        ConfigError: not enough for one sequence of max_model_len, or more than there is.
    """
    available = available_memory()
    if kv_cache_tokens is not None:
        wanted, origin = _bytes_of_tokens(layout, kv_cache_tokens), "kv_cache_tokens"
    elif kv_cache_size is not None:
        size = kv_cache_size * available if kv_cache_size < 1 else kv_cache_size
        wanted, origin = int(size), "kv_cache_bytes"
    else:
        wanted, origin = min(_CPU_DEFAULT_BYTES, int(available * _CPU_DEFAULT_SHARE)), "default"
    return _fit(layout, max_model_len, _Uses("cpu", available, weights), wanted, origin)


@dataclasses.dataclass(frozen=True, slots=True)
class _Uses:
    """What there is, and what takes of it before the KV cache does."""

    device: str
    available: int
    weights: int
    activations: int = 0
    graphs: int = 0


def plan_cuda(
    layout: KVLayout,
    max_model_len: int,
    memory: DeviceMemory,
    utilization: float,
    measure: Callable[[], tuple[int, int]],
    *,
    kv_cache_bytes: int | None,
    kv_cache_tokens: int | None,
) -> MemoryBudget:
    """Returns the budget on a CUDA device. The weights are loaded already.

    Args:
        layout: geometry of a block; its block_count is not looked at.
        max_model_len: longest sequence in tokens.
        memory: of the device.
        utilization: share of the device's memory that may be used, other processes' share included.
        measure: returns (peak of the largest step beyond what is resident, what graphs and state take), in bytes.
        kv_cache_bytes: the KV cache's size, if it was set.
        kv_cache_tokens: the same in tokens; goes before the bytes.

    Raises:
        ConfigError: not enough for one sequence of max_model_len, or more than there is.
    """
    memory.release()
    weights = memory.allocated()
    activations, graphs = measure()
    memory.release()
    free, total = memory.free_and_total()
    # What this process does not hold is held by neighbours or by the driver: it counts against the share.
    others = total - free - memory.reserved()
    available = min(int(total * utilization) - others, free + memory.reserved())
    room = available - weights - activations - graphs
    if kv_cache_tokens is not None:
        wanted, origin = _bytes_of_tokens(layout, kv_cache_tokens), "kv_cache_tokens"
    elif kv_cache_bytes is not None:
        wanted, origin = kv_cache_bytes, "kv_cache_bytes"
    else:
        wanted, origin = room, f"gpu_memory_utilization {utilization:g}"
    uses = _Uses(memory.name, max(available, 0), weights, activations, graphs)
    return _fit(layout, max_model_len, uses, wanted, origin, room=room)


def allocate_backing_off(
    budget: MemoryBudget, layout: KVLayout, allocate: Callable[[MemoryBudget], Cache], memory: DeviceMemory
) -> tuple[MemoryBudget, Cache]:
    """Returns the budget that holds and what `allocate` made of it.

    A neighbour may have taken memory since the budget was measured. A size that came from the share of memory then
    shrinks step by step, with a warning; a size that was asked for is refused.

    Args:
        budget: as measured.
        layout: geometry of a block; its block_count is not looked at.
        allocate: allocates what the budget says; raises torch.OutOfMemoryError if it cannot.
        memory: of the device.

    Raises:
        ConfigError: what is left does not hold one sequence of max_model_len, or not the size that was asked for.
    """
    planned, failed = budget, False
    for _ in range(_ATTEMPTS):
        free, _ = memory.free_and_total()
        room = free + memory.reserved() - memory.allocated() - budget.activations - budget.graphs
        if failed:
            room = min(room, int(budget.kv_cache * _SHRINK))
        if room < budget.kv_cache:
            budget = _shrunk(budget, planned, layout, room, free)
        try:
            return budget, allocate(budget)
        except torch.OutOfMemoryError:
            failed = True
        # Here the exception is gone, and with it the frames that held what was allocated.
        memory.release()
    raise ConfigError(
        f"{planned.origin}: memory of {planned.device} goes faster than a KV cache can be allocated",
        field="gpu_memory_utilization",
    )


def _shrunk(budget: MemoryBudget, planned: MemoryBudget, layout: KVLayout, room: int, free: int) -> MemoryBudget:
    """Returns a budget for a KV cache of `room` bytes; raises ConfigError if another size was asked for."""
    if not planned.origin.startswith("gpu_memory_utilization"):
        raise ConfigError(
            f"{planned.origin}: a KV cache of {format_bytes(planned.kv_cache)} was asked for, another process has "
            f"taken memory meanwhile: {format_bytes(max(room, 0))} are there",
            field=planned.origin,
        )
    uses = _Uses(budget.device, budget.available, budget.weights, budget.activations, budget.graphs)
    smaller = _fit(layout, budget.max_model_len, uses, room, planned.origin, room=room)
    log.warning(
        events.KV_CACHE_SHRUNK, planned_bytes=planned.kv_cache, kv_cache_bytes=smaller.kv_cache, free_bytes=free,
        advice="another process has taken memory of this device; lower --gpu-memory-utilization or move it",
    )  # fmt: skip
    return smaller


def _bytes_of_tokens(layout: KVLayout, tokens: int) -> int:
    """Returns the bytes of blocks for `tokens`, and of the null block."""
    return (div_ceil(tokens, layout.block_size) + 1) * layout.bytes_per_block


def _fit(
    layout: KVLayout,
    max_model_len: int,
    uses: _Uses,
    wanted: int,
    origin: str,
    *,
    room: int | None = None,
) -> MemoryBudget:
    """Returns the budget for a KV cache of `wanted` bytes; raises ConfigError if that cannot be."""
    room = uses.available if room is None else room
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
        device=uses.device,
        available=uses.available,
        weights=uses.weights,
        activations=uses.activations,
        graphs=uses.graphs,
        kv_cache=block_count * layout.bytes_per_block,
        block_count=block_count,
        block_size=layout.block_size,
        bytes_per_block=layout.bytes_per_block,
        max_model_len=max_model_len,
        origin=origin,
    )
