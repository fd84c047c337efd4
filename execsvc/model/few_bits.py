"""Matrices in few bits: read from files, or rounded here.

What the bytes of llama.cpp's quantised blocks mean; each function takes blocks `[output, block, bytes]` of uint8.

Q8_0   32 weights: scale (half), 32 signed bytes
Q4_0   32 weights: scale, 16 bytes: low halves are the first 16, high halves the others; a quant means itself - 8
Q4_1   32 weights: scale, offset, 16 bytes as before
Q5_0   32 weights: scale, 32 fifth bits, 16 bytes as before; a quant means itself - 16
IQ4_NL 32 weights: scale, 16 bytes as before; a quant means what a table says
IQ4_XS 256 weights: scale of all, 8 scales of 6 bits (upper two in 2 bytes, lower four in 4), 128 bytes as IQ4_NL's
Q4_K   256 weights: scale and offset of all, 12 bytes with 8 scales and 8 offsets of 6 bits (see `_six_bits`),
       128 bytes: of each 32, low halves are 32 weights and high halves the next 32
Q6_K   256 weights: 128 bytes of low halves, 64 bytes of upper pairs of bits, 16 scales (signed bytes), scale of all;
       a quant means itself - 32
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import gguf
import gguf.quants
import torch

from kernels.cpu.panels import GROUP, Quantised

_Kind = gguf.GGMLQuantizationType


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """Returns `[output, block]` float32 of the float16 at a byte."""
    return blocks[..., start : start + 2].contiguous().view(torch.float16).squeeze(-1).float()


def _nibbles(halves: torch.Tensor) -> torch.Tensor:
    """Returns the low halves of the last axis and then the high ones."""
    return torch.cat([halves & 15, halves >> 4], -1)


def _parted(values: torch.Tensor, size: int) -> torch.Tensor:
    """Returns the last axis in parts of `size`."""
    return values.reshape(*values.shape[:-1], -1, size)


def _q8_0(blocks: torch.Tensor) -> Quantised:
    return Quantised(blocks[..., 2:].contiguous().view(torch.int8).flatten(1), _half(blocks, 0), None)


def _q4_0(blocks: torch.Tensor) -> Quantised:
    scales = _half(blocks, 0)
    return Quantised(_nibbles(blocks[..., 2:]).flatten(1), scales, -8.0 * scales)


def _q4_1(blocks: torch.Tensor) -> Quantised:
    return Quantised(_nibbles(blocks[..., 4:]).flatten(1), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: torch.Tensor) -> Quantised:
    fifths = blocks[..., 2:6, None] >> torch.arange(8, dtype=torch.uint8) & 1  # [.., 4, 8]
    quants = (_nibbles(blocks[..., 6:]) | fifths.flatten(-2) << 4).to(torch.int8) - 16
    return Quantised(quants.flatten(1), _half(blocks, 0), None)


def _from_table(halves: torch.Tensor) -> torch.Tensor:
    """Returns what quants in groups of 16 bytes mean in the kinds with a table, `[output, input]`."""
    return _TABLE[_nibbles(halves).long()].flatten(1)


def _iq4_nl(blocks: torch.Tensor) -> Quantised:
    return Quantised(_from_table(blocks[..., 2:]), _half(blocks, 0), None)


def _iq4_xs(blocks: torch.Tensor) -> Quantised:
    low = blocks[..., 4:8, None] >> torch.tensor([0, 4], dtype=torch.uint8) & 15  # [.., 4, 2]
    pairs = blocks[..., 2:4, None] >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8) & 3  # [.., 2, 4]
    scales = (low.flatten(-2) | pairs.flatten(-2) << 4).float() - 32
    return Quantised(_from_table(_parted(blocks[..., 8:], 16)), (_half(blocks, 0)[..., None] * scales).flatten(1), None)


def _six_bits(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns 8 scales and 8 offsets of `[..., 12]` bytes.

    Of the first four of each, six bits are in bytes 0-3 and 4-7. Of the other four, four bits are in the low and in
    the high halves of bytes 8-11, and the upper two in the upper two of bytes 0-3 and 4-7.
    """
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], -1)
    return scales, torch.cat([second & 63, third >> 4 | second >> 6 << 4], -1)


def _q4_k(blocks: torch.Tensor) -> Quantised:
    scales, offsets = _six_bits(blocks[..., 4:16])
    halves = _parted(blocks[..., 16:], 32)
    return Quantised(
        _nibbles(halves).flatten(1),
        (_half(blocks, 0)[..., None] * scales.float()).flatten(1),
        (-_half(blocks, 2)[..., None] * offsets.float()).flatten(1),
    )


def _q6_k(blocks: torch.Tensor) -> Quantised:
    low = _nibbles(_parted(blocks[..., :128], 64))  # [.., 2, 128]
    pairs = _parted(blocks[..., 128:192], 32)
    high = torch.cat([pairs >> shift & 3 for shift in (0, 2, 4, 6)], -1)  # [.., 2, 128]
    scales = blocks[..., 192:208].contiguous().view(torch.int8).float()
    quants = (low | high << 4).to(torch.int8) - 32
    return Quantised(quants.flatten(1), (_half(blocks, 208)[..., None] * scales).flatten(1), None)


_TABLE: Final = torch.tensor(gguf.quants.IQ4_NL.kvalues, dtype=torch.int8)
"""What the 16 quants of IQ4_NL and IQ4_XS mean."""

UNPACK: Final[Mapping[gguf.GGMLQuantizationType, Callable[[torch.Tensor], Quantised]]] = {
    _Kind.Q8_0: _q8_0,
    _Kind.Q4_0: _q4_0,
    _Kind.Q4_1: _q4_1,
    _Kind.Q5_0: _q5_0,
    _Kind.IQ4_NL: _iq4_nl,
    _Kind.IQ4_XS: _iq4_xs,
    _Kind.Q4_K: _q4_k,
    _Kind.Q6_K: _q6_k,
}
"""Kinds that are multiplied as they are; others are dequantised."""


def quantise(weight: torch.Tensor, bits: int) -> Quantised:
    """Rounds a matrix to `bits`, in groups of GROUP inputs, as llama.cpp's Q8_0 and Q4_1 do.

    In 8 bits a group has a scale, by which its largest magnitude is 127. In 4 bits it has a scale and an offset, by
    which its least and its largest weight are 0 and 15; both are halves, so that products are exact (`Quantised`).

    Args:
        weight: `[output, input]`, any float type; inputs are whole groups.
        bits: 4 or 8.
    """
    groups = weight.float().view(len(weight), -1, GROUP)
    if bits == 8:  # noqa: PLR2004 - bits
        scales = groups.abs().amax(-1) / 127
        quants = (groups / _divisors(scales)).round()
        return Quantised(quants.to(torch.int8).flatten(1), scales, None)
    least = groups.amin(-1).half().float()
    scales = ((groups.amax(-1) - least) / 15).half().float()
    quants = ((groups - least[..., None]) / _divisors(scales)).round().clamp(0, 15)
    return Quantised(quants.to(torch.uint8).flatten(1), scales, least)


def _divisors(scales: torch.Tensor) -> torch.Tensor:
    """Returns scales `[.., 1]` to divide by: 1 where all weights of a group are alike."""
    return torch.where(scales == 0, 1.0, scales)[..., None]
