"""A cache of 8-bit integers in plain torch: what the compiled step must write, and what it must read."""

from __future__ import annotations

import torch

from kernels.cpu.panels import LANE

_LARGEST = 127
_SCALE_BYTES = torch.float32.itemsize


def quantise(heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns 8-bit integers and scales, whose product is close to `heads`.

    Args:
        heads: `[..., head_dim]` float32, finite.

    Returns:
        Like `heads` int8 in -127 .. 127, and `[...]` float32: the largest magnitude / 127, 0 where all are zero.
    """
    scales = heads.abs().amax(-1) / _LARGEST
    ratios = torch.where(scales[..., None] > 0, heads / scales[..., None], 0.0)
    return ratios.round().clamp(-_LARGEST, _LARGEST).to(torch.int8), scales


def dequantise(quants: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Returns what `quantise` gave these for, rounded: float32."""
    return quants.float() * scales[..., None]


def read_cache(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what a cache of panels holds, position by position.

    Args:
        cache: `[block, layer, 2, kv_head, block_size, head_dim + 4]` int8, as `kernels.cpu.panels` describes it.

    Returns:
        `[block, layer, 2, kv_head, block_size, head_dim]` int8, and `[block, layer, 2, kv_head, block_size]` float32.
    """
    *outer, block_size, slot_bytes = cache.shape
    head_dim = slot_bytes - _SCALE_BYTES
    runs = cache.reshape(*outer, block_size // LANE, LANE * slot_bytes)
    scales = runs[..., : LANE * _SCALE_BYTES].contiguous().view(torch.float32)
    panels = runs[..., LANE * _SCALE_BYTES :].contiguous()
    # [..., run, element / 2, 2, position] -> [..., run, position, element]
    shape = panels.shape[:2] + panels.shape[3:-1]
    keys = panels[:, :, 0].view(*shape, head_dim // 2, 2, LANE).movedim(-1, -3).flatten(-2)
    # [..., run, element / 16, position / 2, 2, 16] -> [..., run, position / 2, 2, element / 16, 16]
    values = panels[:, :, 1].view(*shape, head_dim // LANE, LANE // 2, 2, LANE).movedim(-4, -2)
    values = values.flatten(-2).flatten(-3, -2)
    return torch.stack([part.flatten(-3, -2) for part in (keys, values)], 2), scales.flatten(-2)
