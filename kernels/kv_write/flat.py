"""Torch: indices once a step, one indexed copy a layer."""

import torch

from kernels.layout import KVLayout


def plan_rows(layout: KVLayout, slots: torch.Tensor) -> torch.Tensor:
    """Returns which rows of the flat cache a step writes, `[token * kv_head]` int64, for the keys of layer 0.

    Args:
        layout: of the cache.
        slots: `[token]` int64, block * block_size + offset.
    """
    blocks = torch.div(slots, layout.block_size, rounding_mode="floor")
    offsets = slots - blocks * layout.block_size
    heads = torch.arange(layout.num_kv_heads, device=slots.device) * layout.block_size
    block_rows = layout.block_elements // layout.head_dim
    return (blocks * block_rows + offsets)[:, None].add(heads).flatten()


def write_rows(
    cache: torch.Tensor, layout: KVLayout, layer: int, rows: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> None:
    """Writes each token's key and value of one layer. Writes `cache`.

    Args:
        cache: the whole KV cache, of `layout`, contiguous.
        layout: of `cache`.
        layer: which layer.
        rows: from `plan_rows`.
        key: `[token, kv_head, head_dim]`.
        value: like `key`.
    """
    flat = cache.view(-1, layout.head_dim)
    head_rows = layout.num_kv_heads * layout.block_size
    for part, data in ((2 * layer, key), (2 * layer + 1, value)):
        flat[part * head_rows :].index_copy_(0, rows, data.reshape(-1, layout.head_dim).to(cache.dtype))
