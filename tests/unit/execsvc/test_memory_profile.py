"""The budget fits, is printed, and a refusal says what would fit."""

from __future__ import annotations

import pytest
import torch

from execsvc.memory_profile import MemoryBudget, allocate_backing_off, available_memory, plan_cpu, plan_cuda
from kernels.layout import KVLayout
from quire.errors import ConfigError

LAYOUT = KVLayout(1, 4, 2, 16, 64, torch.float32)
MIB = 2**20


def test_the_size_can_be_given_in_bytes_or_tokens() -> None:
    """Otherwise operators could not plan. One more block than the tokens need: the null block is never granted."""
    by_bytes = plan_cpu(LAYOUT, 256, 0, kv_cache_size=64 * MIB, kv_cache_tokens=None)
    assert by_bytes.block_count == 64 * MIB // LAYOUT.bytes_per_block
    by_tokens = plan_cpu(LAYOUT, 256, 0, kv_cache_size=64 * MIB, kv_cache_tokens=1000)
    assert by_tokens.block_count == 64
    assert by_tokens.token_capacity == 63 * 16
    assert by_tokens.max_concurrency == 63 / 16


def test_the_size_can_be_a_share_of_what_is_free() -> None:
    """The same setting then serves machines of any size."""
    free = available_memory()
    budget = plan_cpu(LAYOUT, 256, 0, kv_cache_size=0.01, kv_cache_tokens=None)
    assert budget.kv_cache == pytest.approx(0.01 * free, rel=0.1)
    assert budget.origin == "kv_cache_bytes"


def test_the_default_leaves_the_machine_its_memory() -> None:
    """Otherwise a laptop would swap."""
    budget = plan_cpu(LAYOUT, 256, 0, kv_cache_size=None, kv_cache_tokens=None)
    assert budget.kv_cache <= min(2**30, available_memory())
    assert "KV blocks" in budget.table()
    assert "1 of" not in budget.table().splitlines()[0]


@pytest.mark.row(64)
def test_a_cache_too_small_names_the_length_that_fits() -> None:
    """Otherwise an operator would have to guess."""
    with pytest.raises(ConfigError, match="max_model_len to 992 or less") as caught:
        plan_cpu(LAYOUT, 2048, 0, kv_cache_size=63 * LAYOUT.bytes_per_block, kv_cache_tokens=None)
    assert caught.value.metadata["feasible_max_model_len"] == "992"
    with pytest.raises(ConfigError, match="needs a KV cache of"):
        plan_cpu(LAYOUT, 16, 0, kv_cache_size=1, kv_cache_tokens=None)


def test_more_than_there_is_is_refused() -> None:
    """Otherwise the process would be killed later, in the middle of an answer."""
    with pytest.raises(ConfigError, match="are there"):
        plan_cpu(LAYOUT, 256, 0, kv_cache_size=2**50, kv_cache_tokens=None)


class FakeMemory:
    """A device whose memory moves as a test says."""

    name = "cuda:0"

    def __init__(self, total: int, free: int, allocated: int) -> None:
        self.total, self.free, self.held = total, free, allocated

    def free_and_total(self) -> tuple[int, int]:
        """Returns what was set."""
        return self.free, self.total

    def allocated(self) -> int:
        """Returns what was set."""
        return self.held

    reserved = allocated

    def start_peak(self) -> None:
        """Does nothing."""

    def peak(self) -> int:
        """Returns what is held."""
        return self.held

    def release(self) -> None:
        """Does nothing."""


GIB = 2**30


def _plan(memory: FakeMemory, utilization: float = 0.9, **sizes: int) -> MemoryBudget:
    """Returns the budget with 1 GiB of activations and half of one for graphs."""
    chosen: dict[str, int | None] = {"kv_cache_bytes": None, "kv_cache_tokens": None, **sizes}
    return plan_cuda(LAYOUT, 256, memory, utilization, lambda: (GIB, GIB // 2), **chosen)


def test_a_gpu_s_budget_counts_everything_once() -> None:
    """Weights, the largest step, graphs and what neighbours hold come before the cache; the table says so."""
    # 80 GiB, of which a neighbour holds 10 and this process 16.
    memory = FakeMemory(80 * GIB, 54 * GIB, 16 * GIB)
    budget = _plan(memory)
    assert budget.weights == 16 * GIB
    assert budget.available == int(80 * GIB * 0.9) - 10 * GIB
    assert 0 <= budget.available - 16 * GIB - 3 * GIB // 2 - budget.kv_cache < LAYOUT.bytes_per_block
    table = budget.table()
    for row in (
        "weights",
        "activations at the largest step",
        "graphs and state",
        "KV cache",
        "left",
        "gpu_memory_util",
    ):
        assert row in table
    smaller = _plan(memory, kv_cache_bytes=GIB)
    assert smaller.kv_cache == GIB
    assert smaller.left == smaller.available - 16 * GIB - 3 * GIB // 2 - GIB
    with pytest.raises(ConfigError, match=r"a KV cache of 60\.0 GiB was asked for, 44\.5 GiB are there"):
        _plan(memory, kv_cache_bytes=60 * GIB)


def test_a_model_too_long_for_what_is_left_is_told_the_length_that_fits() -> None:
    """Otherwise an operator would have to find it by trying, at a minute a try."""
    memory = FakeMemory(80 * GIB, 64 * GIB - 1, 16 * GIB)
    layout_tokens = 40 * 16
    utilization = (16 * GIB + 3 * GIB // 2 + 41 * LAYOUT.bytes_per_block + 2**20) / (80 * GIB)
    with pytest.raises(ConfigError, match="max_model_len to") as caught:
        plan_cuda(
            LAYOUT, 10**6, memory, utilization, lambda: (GIB, GIB // 2), kv_cache_bytes=None, kv_cache_tokens=None
        )
    assert layout_tokens <= int(str(caught.value.metadata["feasible_max_model_len"])) < layout_tokens + 16 * 40


def test_a_neighbour_that_takes_memory_meanwhile_makes_the_cache_smaller() -> None:
    """Otherwise two executors that start together on one device would both die."""
    memory = FakeMemory(80 * GIB, 64 * GIB, 16 * GIB)
    budget = _plan(memory)
    asked: list[int] = []

    def allocate(tried: MemoryBudget) -> str:
        asked.append(tried.kv_cache)
        if len(asked) == 1:
            raise torch.OutOfMemoryError
        return "cache"

    memory.free -= 20 * GIB
    found, cache = allocate_backing_off(budget, LAYOUT, allocate, memory)
    assert cache == "cache"
    assert asked[0] <= 64 * GIB - 20 * GIB - 3 * GIB // 2 < budget.kv_cache
    assert found.kv_cache == asked[1] < asked[0]
    memory.free = 0
    with pytest.raises(ConfigError, match="max_model_len"):
        allocate_backing_off(budget, LAYOUT, allocate, memory)


def test_a_size_that_was_asked_for_is_refused_when_it_is_gone() -> None:
    """Whoever names a size counts on it: a smaller cache would break the promise in silence."""
    memory = FakeMemory(80 * GIB, 64 * GIB, 16 * GIB)
    budget = _plan(memory, kv_cache_bytes=40 * GIB)
    memory.free -= 30 * GIB
    with pytest.raises(ConfigError, match=r"kv_cache_bytes: .* another process has taken memory"):
        allocate_backing_off(budget, LAYOUT, lambda _: "cache", memory)
