"""The parts of a decoder, as functions on tensors."""

from __future__ import annotations

import dataclasses
import math
import platform
from typing import Final, Protocol

import torch
from torch.nn import functional

from execsvc.model.config import RopeConfig

_PACK_ROWS: Final = 8
"""Rows that packing is tuned for: a decode of a few sequences."""


class Projection(Protocol):
    """A matrix product with a bias or none."""

    @property
    def parameter_count(self) -> int:
        """Number of weights, bias included."""
        ...

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns `[row, out]` for `rows` `[row, in]`."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Linear:
    """A projection as torch computes it."""

    weight: torch.Tensor
    """`[out, in]`."""
    bias: torch.Tensor | None = None
    """`[out]`."""

    @property
    def parameter_count(self) -> int:
        """See Projection."""
        return self.weight.numel() + (0 if self.bias is None else self.bias.numel())

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """See Projection."""
        return functional.linear(rows, self.weight, self.bias)


@dataclasses.dataclass(frozen=True, slots=True)
class PackedLinear:
    """A projection whose weights oneDNN has packed for itself.

    Packing once saves doing it at each product: 1.5 to 2 times faster for a few rows (float32, AVX-512), and its
    rows depend less on the number of rows than MKL's.
    """

    packed: torch.Tensor
    """Opaque."""
    bias: torch.Tensor | None
    parameter_count: int

    @classmethod
    def pack(cls, weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
        """Returns the projection with `weight` `[out, in]` packed; `weight` itself is no longer needed."""
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS)  # noqa: SLF001 - what torch.compile uses
        return cls(packed, bias, Linear(weight, bias).parameter_count)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """See Projection."""
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(  # noqa: SLF001 - the product for packed weights
            rows, self.packed, self.bias, "none", [], ""
        )
        return product


def project(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Projection:
    """Returns the fastest projection for where `weight` `[out, in]` lies."""
    packable = (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and platform.machine() in {"x86_64", "AMD64"}
    )
    return PackedLinear.pack(weight, bias) if packable else Linear(weight, bias)


@dataclasses.dataclass(frozen=True, slots=True)
class RMSNorm:
    """Root mean square normalisation over the last axis, computed in float32."""

    weight: torch.Tensor
    """`[size]`."""
    eps: float

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns `rows`, normalised, in their own type."""
        wide = rows.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(self.eps))
        return (wide * scale).to(rows.dtype) * self.weight


def inverse_frequencies(rope: RopeConfig, head_dim: int, factors: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the angles that one position turns, `[head_dim / 2]` float32.

    Args:
        rope: settings.
        head_dim: elements of a head.
        factors: divisors, `[head_dim / 2]`, which a GGUF file may bring; they stand for a scaling already computed.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if factors is not None:
        return frequencies / factors.float()
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(frequencies, rope)
    return frequencies


def _llama3(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Returns frequencies scaled as Llama 3.1 does: low ones by the factor, high ones not, a ramp between."""
    wavelengths = 2 * math.pi / frequencies
    low, high = rope.original_max_position / rope.low_freq_factor, rope.original_max_position / rope.high_freq_factor
    scaled = torch.where(wavelengths > low, frequencies / rope.factor, frequencies)
    ramp = (rope.original_max_position / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    ramped = (1 - ramp) * scaled / rope.factor + ramp * scaled
    between = ~(wavelengths < high) & ~(wavelengths > low)
    return torch.where(between, ramped, scaled)


@dataclasses.dataclass(frozen=True, slots=True)
class Rotary:
    """Tables of the rotary embedding for every position."""

    cosines: torch.Tensor
    """`[position, head_dim / 2]` float32."""
    sines: torch.Tensor
    """Like `cosines`."""

    @classmethod
    def build(cls, frequencies: torch.Tensor, position_count: int, device: torch.device) -> Rotary:
        """Returns the tables for positions 0 .. position_count - 1."""
        angles = torch.outer(torch.arange(position_count, dtype=torch.float32), frequencies)
        return cls(angles.cos().to(device), angles.sin().to(device))

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns cosines and sines for `positions` `[row]`, each `[row, 1, head_dim / 2]`."""
        return self.cosines.index_select(0, positions)[:, None], self.sines.index_select(0, positions)[:, None]


def rotate(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Returns `heads` `[row, head, head_dim]` with element i turned with element i + head_dim / 2, in float32."""
    half = heads.shape[-1] // 2
    first, second = heads[..., :half].float(), heads[..., half:].float()
    out = torch.empty_like(heads)
    out[..., :half] = first * cosines - second * sines
    out[..., half:] = second * cosines + first * sines
    return out
