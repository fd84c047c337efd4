"""Puts an engine together in the memory that there is: measures, budgets, allocates."""

from __future__ import annotations

import dataclasses
import sys
import time

import structlog
import torch

from execsvc import attention, events, memory_profile
from execsvc.config import ExecsvcConfig
from execsvc.engine import Engine
from execsvc.gpu.device_memory import CudaMemory, DeviceMemory
from execsvc.gpu.kv_scales import KVScales
from execsvc.gpu.ladder import ladder
from execsvc.kv_cache import KVCache
from execsvc.memory_profile import MemoryBudget
from execsvc.model.llama import Llama
from execsvc.model.native import NativeModel
from execsvc.runner import NativeRunner, Runner
from execsvc.warmup import run_step
from kernels.layout import KVLayout
from quire.errors import ConfigError

log = structlog.get_logger(__name__)

_SAMPLED_GRAPHS = 2
"""Sizes that are captured to measure what the others will take."""


@dataclasses.dataclass(frozen=True, slots=True)
class Assembled:
    """An engine and what it stands on."""

    engine: Engine
    cache: KVCache
    attention_backend: str
    budget: MemoryBudget


@dataclasses.dataclass(frozen=True, slots=True)
class Assembly:
    """Everything that an engine is built from but the size of its cache."""

    config: ExecsvcConfig
    model: Llama | NativeModel
    device: torch.device
    kv_dtype: torch.dtype
    max_model_len: int
    max_num_batched_tokens: int

    @property
    def on_gpu(self) -> bool:
        """Whether steps are launched as `execsvc.gpu` does."""
        return self.device.type == "cuda" and self.config.attention_backend != "torch"

    def layout(self, block_count: int) -> KVLayout:
        """Returns the geometry of a KV cache."""
        config = self.model.config
        return KVLayout(
            block_count, config.num_layers, config.num_kv_heads, self.config.block_size, config.head_dim, self.kv_dtype
        )

    def assemble(self) -> Assembled:
        """Returns the engine; prints the budget.

        Raises:
            ConfigError: the memory does not suffice for what was asked.
        """
        config = self.config
        size = config.kv_cache_size
        if self.device.type == "cpu":
            budget = memory_profile.plan_cpu(
                self.layout(1),
                self.max_model_len,
                self.model.weight_bytes,
                kv_cache_size=size,
                kv_cache_tokens=config.kv_cache_tokens,
            )
            return _told(self._build(budget))
        if isinstance(size, float):
            raise ConfigError(
                f"kv_cache_bytes: {config.kv_cache_bytes} is a share of main memory; on {self.device} give a size, for "
                "example 8GiB, or the share of the device with --gpu-memory-utilization",
                field="kv_cache_bytes",
            )
        memory = CudaMemory(self.device)
        budget = memory_profile.plan_cuda(
            self.layout(1),
            self.max_model_len,
            memory,
            config.gpu_memory_utilization,
            lambda: self._measure(memory),
            kv_cache_bytes=size,
            kv_cache_tokens=config.kv_cache_tokens,
        )
        _, assembled = memory_profile.allocate_backing_off(budget, self.layout(1), self._build, memory)
        return _told(assembled)

    def _build(self, budget: MemoryBudget) -> Assembled:
        """Allocates what a budget says."""
        cache = KVCache(self.layout(budget.block_count), self.device)
        swap_slot_count = self.config.swap_byte_count // budget.bytes_per_block
        engine, backend_name = self._engine(cache, None, swap_slot_count)
        return Assembled(engine, cache, backend_name, budget)

    def _engine(self, cache: KVCache, sizes: list[int] | None, swap_slot_count: int = 0) -> tuple[Engine, str]:
        """Returns an engine, and the name of what computes attention.

        Args:
            cache: its KV cache.
            sizes: batch sizes to capture on a GPU; None for all.
            swap_slot_count: blocks that host memory is set aside for.
        """
        limits = {
            "max_num_seqs": self.config.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "max_model_len": self.max_model_len,
        }
        if isinstance(self.model, NativeModel):
            name = f"{attention.NATIVE} ({self.model.decoder.variant.name})"
            return Engine(NativeRunner(self.model, cache), cache, swap_slot_count=swap_slot_count, **limits), name
        if self.on_gpu:
            from execsvc.gpu.steps import gpu_steps  # noqa: PLC0415 - imports triton's kernels

            assert isinstance(self.model, Llama), "the other kind of model is for CPUs"
            known = self.model.kv_scales if self.kv_dtype.itemsize == 1 else None
            scales = KVScales(self.model.config.num_layers, known)
            gpu = gpu_steps(
                self.model, cache, batch_invariant=self.config.batch_invariant,
                cascade=not self.config.disable_cascade_attn, scales=scales, **limits,
            )  # fmt: skip
            started = time.monotonic()
            gpu.capture([] if self.config.enforce_eager else sizes)
            seconds = round(time.monotonic() - started, 1)
            if gpu.sizes:
                log.info(events.GRAPHS_CAPTURED, size_count=len(gpu.sizes), seconds=seconds)
            return Engine(gpu, cache, swap_slot_count=swap_slot_count, **limits), "triton"
        backend = attention.create(self.config.attention_backend, cache, self.model.config.sliding_window)
        steps = Runner(self.model, backend, cache)
        return Engine(steps, cache, swap_slot_count=swap_slot_count, **limits), backend.name

    def _measure(self, memory: DeviceMemory) -> tuple[int, int]:
        """Returns (peak of the largest step, what graphs and state take), on a cache that holds just that step.

        The largest sizes are captured first and the others fit into the memory that they took, each with what the
        driver needs for it: so two sizes tell what all of them take.
        """
        length = min(self.max_num_batched_tokens, self.max_model_len)
        blocks = self.max_num_batched_tokens // self.config.block_size + self.max_num_batched_tokens // length + 3
        cache = KVCache(self.layout(blocks), self.device)
        before = memory.allocated()
        engine, _ = self._engine(cache, [])
        state = memory.allocated() - before
        memory.start_peak()
        before = memory.allocated()
        sequence_count = min(self.config.max_num_seqs, self.max_num_batched_tokens)
        run_step(engine, self.max_num_batched_tokens, sequence_count, self.config.block_size)
        activations = memory.peak() - before
        del engine
        return activations, state + self._measure_graphs(cache, memory)

    def _measure_graphs(self, cache: KVCache, memory: DeviceMemory) -> int:
        """Returns what captured graphs take beyond the state that they work on."""
        if not self.on_gpu or self.config.enforce_eager:
            return 0
        sizes = ladder(self.config.max_num_seqs)
        used: list[int] = []
        for count in range(_SAMPLED_GRAPHS + 1):
            memory.release()
            free_before, _ = memory.free_and_total()
            engine, _ = self._engine(cache, sizes[len(sizes) - count :] if count else [])
            memory.release()
            used.append(free_before - memory.free_and_total()[0])
            del engine
        first, second = used[1] - used[0], max(0, used[2] - used[1])
        return max(0, first) + second * (len(sizes) - 1)


def _told(assembled: Assembled) -> Assembled:
    """Prints and logs the budget that it came to."""
    sys.stderr.write(assembled.budget.table() + "\n")
    log.info(events.MEMORY_BUDGETED, **dataclasses.asdict(assembled.budget))
    return assembled
