"""Sizes of a cache, and the names that tell caches apart."""

from __future__ import annotations

import pytest
import torch

from kernels.cpu import reference
from kernels.layout import DTYPE_NAMES, INT8, KVLayout
from memsvc.core.validation import KV_DTYPES


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("head_dim", [16, 48, 64, 128])
def test_a_head_in_8_bits_takes_its_bytes_and_a_scale(block_size: int, head_dim: int) -> None:
    """Budgets would promise more tokens than the cache holds, or lines of two heads would be one."""
    layout = KVLayout(3, 2, 5, block_size, head_dim, INT8)
    assert layout.bytes_per_block == 2 * 2 * 5 * block_size * (head_dim + 4)
    assert layout.bytes_per_block % 64 == 0
    cache = layout.allocate(torch.device("cpu"))
    assert cache.nbytes == layout.total_bytes
    quants, scales = reference.read_cache(cache)
    assert quants.shape == (3, 2, 2, 5, block_size, head_dim)
    assert scales.shape == (3, 2, 2, 5, block_size)


def test_every_cache_has_a_name_that_the_memory_service_takes() -> None:
    """An executor could not register its pool, or two kinds of cache would share hints and prefix hashes."""
    assert set(DTYPE_NAMES.values()) == set(KV_DTYPES)
    assert len(set(DTYPE_NAMES.values())) == len(DTYPE_NAMES)


def test_rounding_is_within_half_a_step() -> None:
    """The reference would be no measure for what the compiled step writes."""
    heads = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    heads[3] = 0.0
    quants, scales = reference.quantise(heads)
    error = (reference.dequantise(quants, scales) - heads).abs()
    assert bool((error <= scales[:, None] * 0.5001).all())
    assert scales[3] == 0.0
    assert not quants[3].any()
    assert int(quants.abs().max()) == 127
