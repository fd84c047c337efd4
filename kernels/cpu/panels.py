"""How weights, keys and values lie in memory for the step: panels of 16 outputs (panels.h draws them).

    matrix [output, input]                        -> [output / 16, input / 2, 16, 2]
    keys of a head of a block [block_size, dim]   -> [block_size / 16, dim / 2, 16, 2]
    values, the same                              -> [block_size / 16, dim / 16, 8, 16, 2]

In a cache of 8-bit integers each 16 positions of a head are 16 scales (float32), then the bytes (cache.h draws them):

    keys of 16 positions                          -> [dim / 2, 2, 16]
    values of 16 positions                        -> [dim / 16, 8, 2, 16]

Matrices may also stay in the 4 or 8 bits that their file has them in (formats.h says how those panels look).

A block of the cache has as many bytes as in `kernels.layout`, so copies, resets and sizes know nothing of panels.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import torch
from torch.nn import functional

BF16: Final = 0
FOUR_BITS: Final = 1
EIGHT_BITS: Final = 2
EIGHT_BITS_OF_16: Final = 3
"""EIGHT_BITS with a scale for each 16 inputs."""
GROUP: Final = 32
"""Inputs that share a scale, in the other formats of few bits."""

LANE = 16
"""Outputs of a panel."""
PAIR = 2 * LANE
"""Outputs are padded to whole pairs of panels."""


@dataclasses.dataclass(frozen=True, slots=True)
class Matrix:
    """A packed matrix."""

    panels: torch.Tensor
    format: int
    """BF16, FOUR_BITS, EIGHT_BITS or EIGHT_BITS_OF_16."""


@dataclasses.dataclass(frozen=True, slots=True)
class Quantised:
    """A matrix in few bits: weight = scale * quant + offset, with a scale and an offset for each group of inputs."""

    quants: torch.Tensor
    """`[output, input]`, uint8 below 16 if there are offsets, else int8."""
    scales: torch.Tensor
    """`[output, input / group]` float32. A group has GROUP inputs, or half as many where there are no offsets. Where
    there are, scales have so few bits that their product with a quant is exact."""
    offsets: torch.Tensor | None
    """Like `scales`, or None for none."""

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.quants.shape[1] // self.scales.shape[1]

    def rows(self, order: torch.Tensor) -> Quantised:
        """Returns the rows of the given indexes."""
        offsets = None if self.offsets is None else self.offsets[order]
        return Quantised(self.quants[order], self.scales[order], offsets)

    def dequantise(self) -> torch.Tensor:
        """Returns `[output, input]` float32."""
        groups = self.quants.float().view(*self.scales.shape, self.group) * self.scales[:, :, None]
        if self.offsets is not None:
            groups += self.offsets[:, :, None]
        return groups.flatten(1)


def stack(parts: list[Quantised]) -> Quantised | None:
    """Returns the rows of all parts, or None if they differ in their groups or in whether there are offsets."""
    offsets = [part.offsets for part in parts if part.offsets is not None]
    if len(offsets) not in {0, len(parts)} or len({part.group for part in parts}) > 1:
        return None
    return Quantised(
        torch.cat([part.quants for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(offsets) if offsets else None,
    )


def woven(rows: int) -> torch.Tensor:
    """Returns the order of the rows of gate and up, `rows` together: LANE of the gate, LANE of up, and so on."""
    return torch.arange(rows).view(2, -1, LANE).transpose(0, 1).flatten()


def _padded(rows: torch.Tensor) -> torch.Tensor:
    """Returns `rows` `[row, ...]` with zeros added to a multiple of PAIR."""
    missing = -len(rows) % PAIR
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows


def pack(weight: torch.Tensor | Quantised) -> Matrix:
    """Returns the panels of `weight` `[output, input]`, bfloat16 or in few bits; outputs are padded to whole PAIRs."""
    if isinstance(weight, Quantised):
        return _pack_quantised(weight)
    padded = _padded(weight)
    return Matrix(padded.view(-1, LANE, weight.shape[1] // 2, 2).transpose(1, 2).contiguous(), BF16)


def _pack_quantised(weight: Quantised) -> Matrix:
    """Returns panels of bytes, `[output / 16, input / group, bytes of a group]`."""

    def by_group(values: torch.Tensor) -> torch.Tensor:
        """Returns `[panel, group, bytes]` of `[output, group]` floats."""
        return _padded(values).view(-1, LANE, values.shape[1]).transpose(1, 2).contiguous().view(torch.uint8)

    # [panel, lane, group, pair, 2] -> [panel, group, pair, 2, lane]
    quants = _padded(weight.quants).view(-1, LANE, weight.scales.shape[1], weight.group // 2, 2).permute(0, 2, 3, 4, 1)
    if weight.offsets is None:
        parts = [by_group(weight.scales), quants.contiguous().view(torch.uint8).flatten(2)]
        return Matrix(torch.cat(parts, 2).contiguous(), EIGHT_BITS if weight.group == GROUP else EIGHT_BITS_OF_16)
    halves = quants[..., 0, :] | quants[..., 1, :] << 4
    parts = [by_group(weight.scales), by_group(weight.offsets), halves.flatten(2)]
    return Matrix(torch.cat(parts, 2).contiguous(), FOUR_BITS)


def pad_bias(bias: torch.Tensor) -> torch.Tensor:
    """Returns `bias` `[output]` in float32, padded as the panels are."""
    return functional.pad(bias.float(), (0, -len(bias) % PAIR))
