"""Writing to the cache and copying blocks, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.block_copy import reference as copy_reference
from kernels.kv_write import reference as write_reference


def _cache(dtype: torch.dtype) -> torch.Tensor:
    """Returns `[block, layer, 2, kv_head, slot, dim]` with distinct content."""
    return torch.arange(6 * 2 * 2 * 3 * 16 * 8, dtype=torch.float32).reshape(6, 2, 2, 3, 16, 8).to(dtype)


@pytest.mark.parametrize("token_count", [0, 1, 15, 17])
def test_kv_write_equals_the_reference(kernels: Any, dtype: torch.dtype, token_count: int) -> None:
    """A token's key must land in its slot and nowhere else; a negative slot writes nothing."""
    generator = torch.Generator().manual_seed(1)
    slots = torch.randperm(95, generator=generator)[:token_count] + 1
    if token_count > 1:
        slots[1] = -1
    key, value = torch.randn(2, token_count, 3, 8, generator=generator).to(dtype)
    expected, found = _cache(dtype), _cache(dtype)
    write_reference.kv_write(key, value, expected[:, 1, 0], expected[:, 1, 1], slots)
    kernels.kv_write(key, value, found[:, 1, 0], found[:, 1, 1], slots)
    assert torch.equal(found, expected)


def test_kv_write_takes_strided_rows(kernels: Any) -> None:
    """Keys and values are slices of one fused projection: their rows are not dense."""
    fused = torch.randn(5, 4, 3, 8)
    key, value = fused[:, 1], fused[:, 2]
    slots = torch.tensor([16, 40, 41, 95, 33])
    expected, found = _cache(torch.float32), _cache(torch.float32)
    write_reference.kv_write(key, value, expected[:, 0, 0], expected[:, 0, 1], slots)
    kernels.kv_write(key, value, found[:, 0, 0], found[:, 0, 1], slots)
    assert torch.equal(found, expected)


def test_block_copy_copies_every_layer(kernels: Any, dtype: torch.dtype) -> None:
    """A copy-on-write must take the whole block with it, and touch no other."""
    pairs = torch.tensor([[1, 4], [1, 5], [2, 3]])
    expected, found = _cache(dtype), _cache(dtype)
    copy_reference.block_copy(expected, pairs)
    kernels.block_copy(found, pairs)
    assert torch.equal(found, expected)
    kernels.block_copy(found, torch.empty(0, 2, dtype=torch.int64))
    assert torch.equal(found, expected)


def test_wrong_arguments_are_named(kernels: Any) -> None:
    """A caller must learn which argument does not fit before anything is written."""
    cache = _cache(torch.float32)
    with pytest.raises(ValueError, match="pairs"):
        kernels.block_copy(cache, torch.tensor([1, 2]))
    key = torch.zeros(2, 3, 8)
    with pytest.raises(ValueError, match="slots"):
        kernels.kv_write(key, key, cache[:, 0, 0], cache[:, 0, 1], torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="value"):
        kernels.kv_write(key, key[:1], cache[:, 0, 0], cache[:, 0, 1], torch.zeros(2, dtype=torch.int64))
