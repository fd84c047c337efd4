"""The budget fits, is printed, and a refusal says what would fit."""

from __future__ import annotations

import pytest
import torch

from execsvc.memory_profile import available_memory, plan_cpu
from kernels.layout import KVLayout
from quire.errors import ConfigError

LAYOUT = KVLayout(1, 4, 2, 16, 64, torch.float32)
MIB = 2**20


def test_the_size_can_be_given_in_bytes_or_tokens() -> None:
    """Otherwise operators could not plan. One more block than the tokens need: the null block is never granted."""
    by_bytes = plan_cpu(LAYOUT, 256, 0, kv_cache_bytes=64 * MIB, kv_cache_tokens=None)
    assert by_bytes.block_count == 64 * MIB // LAYOUT.bytes_per_block
    by_tokens = plan_cpu(LAYOUT, 256, 0, kv_cache_bytes=64 * MIB, kv_cache_tokens=1000)
    assert by_tokens.block_count == 64
    assert by_tokens.token_capacity == 63 * 16
    assert by_tokens.max_concurrency == 63 / 16


def test_the_default_leaves_the_machine_its_memory() -> None:
    """Otherwise a laptop would swap."""
    budget = plan_cpu(LAYOUT, 256, 0, kv_cache_bytes=None, kv_cache_tokens=None)
    assert budget.kv_cache <= min(2**30, available_memory())
    assert "KV blocks" in budget.table()
    assert "1 of" not in budget.table().splitlines()[0]


@pytest.mark.row(64)
def test_a_cache_too_small_names_the_length_that_fits() -> None:
    """Otherwise an operator would have to guess."""
    with pytest.raises(ConfigError, match="max_model_len to 992 or less") as caught:
        plan_cpu(LAYOUT, 2048, 0, kv_cache_bytes=63 * LAYOUT.bytes_per_block, kv_cache_tokens=None)
    assert caught.value.metadata["feasible_max_model_len"] == "992"
    with pytest.raises(ConfigError, match="needs a KV cache of"):
        plan_cpu(LAYOUT, 16, 0, kv_cache_bytes=1, kv_cache_tokens=None)


def test_more_than_there_is_is_refused() -> None:
    """Otherwise the process would be killed later, in the middle of an answer."""
    with pytest.raises(ConfigError, match="are there"):
        plan_cpu(LAYOUT, 256, 0, kv_cache_bytes=2**50, kv_cache_tokens=None)
