"""The CPU path and the checks, against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels import checks
from kernels.kv_write import flat
from kernels.kv_write import reference as kv_write_reference
from kernels.layout import KVLayout, layer_views
from kernels.paged_attention.options import AttentionOptions
from kernels.paged_attention.reference import paged_attention
from kernels.paged_attention.tiled import attend_tiles, plan_tiles

CPU = torch.device("cpu")


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize(("heads", "head_dim", "block_size"), [((6, 2), 64, 16), ((4, 4), 128, 32), ((9, 3), 80, 64)])
def test_tiles_equal_the_reference(heads: tuple[int, int], head_dim: int, block_size: int, window: int) -> None:
    """Otherwise CPU users would get other tokens than the model's. Unwritten slots are NaN, table ends garbage."""
    lengths = np.array([1, block_size - 1, block_size, block_size + 1, 255, 256, 257, 600])
    counts = np.array([1, block_size - 1, 1, 2, 1, 130, 257, 300])
    blocks_each = -(-lengths // block_size)
    layout = KVLayout(int(blocks_each.sum()) + 1, 2, heads[1], block_size, head_dim, torch.float32)
    cache = torch.full(layout.shape, float("nan"))
    cache[0] = 0.0
    keys, values = layer_views(cache, 1)
    tables = np.full((len(lengths), int(blocks_each.max()) + 1), 2**31 - 1, dtype=np.int32)
    order = np.random.default_rng(3).permutation(int(blocks_each.sum())) + 1
    for row, length in enumerate(lengths):
        own, order = order[: blocks_each[row]], order[blocks_each[row] :]
        tables[row, : len(own)] = own
        for start in range(0, length, block_size):
            size = min(block_size, length - start)
            for part in (keys, values):
                part[own[start // block_size], :, :size] = torch.randn(heads[1], size, head_dim)
    starts = np.concatenate([[0], np.cumsum(counts)])
    q = torch.randn(int(counts.sum()), heads[0], head_dim)
    groups = plan_tiles(layout, tables, lengths, starts, window, CPU)
    out = attend_tiles(q, cache, layout, 1, groups, head_dim**-0.5)
    wanted, _ = paged_attention(
        q, keys, values, torch.from_numpy(tables), torch.from_numpy(lengths), torch.from_numpy(starts),
        AttentionOptions(head_dim**-0.5, window=window),
    )  # fmt: skip
    assert (out.double() - wanted).abs().max() < 5e-6


def test_rows_are_written_where_the_reference_writes_them() -> None:
    """Otherwise keys would land in a stranger's slot."""
    layout = KVLayout(5, 3, 2, 16, 32, torch.float32)
    first, second = layout.allocate(CPU), layout.allocate(CPU)
    slots = torch.tensor([16, 31, 79, 50])
    key, value = torch.randn(4, 2, 32), torch.randn(4, 2, 32)
    flat.write_rows(first, layout, 2, flat.plan_rows(layout, slots), key, value)
    kv_write_reference.kv_write(key, value, *layer_views(second, 2), slots)
    assert torch.equal(first, second)


def test_layout_counts_bytes() -> None:
    """Otherwise the budget printed at start would be wrong."""
    layout = KVLayout(10, 30, 3, 16, 64, torch.float32)
    assert layout.bytes_per_block == 30 * 2 * 3 * 16 * 64 * 4
    assert layout.allocate(CPU).numel() * 4 == layout.total_bytes
    with pytest.raises(ValueError, match="num_layers: 0 is not positive"):
        KVLayout(10, 0, 3, 16, 64, torch.float32)
    with pytest.raises(ValueError, match="dtype"):
        KVLayout(10, 1, 3, 16, 64, torch.int16)


def test_checks_name_the_argument() -> None:
    """Otherwise a wrong tensor would be a riddle, or a crash on the device."""
    tensor = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"q: shape \[2, any, 4\] expected, found \[2, 3\]"):
        checks.check_shape("q", tensor, (2, None, 4))
    with pytest.raises(ValueError, match="q: dtype"):
        checks.check_dtype("q", tensor, (torch.float16,))
    with pytest.raises(ValueError, match="stride 1 in the last axis"):
        checks.check_last_axis_dense("q", tensor.t())
    with pytest.raises(ValueError, match="multiple of 3"):
        checks.group_size(4, 3)
    with pytest.raises(ValueError, match="one device"):
        checks.check_same_device(a=tensor, b=tensor.to("meta"))
