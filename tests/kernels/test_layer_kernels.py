"""What lies between the projections of a layer: norms, the gate, the rotation; against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.rms_norm import reference as norm_reference
from kernels.rotary import reference as rotary_reference
from kernels.silu_mul import reference as gate_reference

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Largest difference relative to the largest expected number: two roundings to the type."""


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    error = (found.cpu().double() - expected).abs().max()
    assert error <= TOLERANCE[found.dtype] * expected.abs().max(), error


@pytest.mark.parametrize(("rows", "size"), [(1, 64), (3, 576), (5, 1000), (70, 48)])
def test_rms_norm_equals_the_reference(
    kernels: Any, device: torch.device, float_dtype: torch.dtype, rows: int, size: int
) -> None:
    """Sizes that are no power of two, one row and more rows than a program takes."""
    data, weight = _random(rows, size).to(float_dtype), _random(size, seed=1).to(float_dtype)
    found = kernels.rms_norm(data.to(device), weight.to(device), 1e-5)
    assert found.dtype == float_dtype
    _assert_near(found, norm_reference.rms_norm(data, weight, 1e-5))


def test_the_norm_of_heads_takes_a_slice_of_the_projection(kernels: Any, device: torch.device) -> None:
    """Models that normalise queries and keys do it head by head, inside one fused projection."""
    fused = _random(7, 9, 32)
    weight = _random(32, seed=1)
    found = kernels.rms_norm(fused.to(device)[:, 2:7], weight.to(device), 1e-6)
    _assert_near(found, norm_reference.rms_norm(fused[:, 2:7], weight, 1e-6))


def test_adding_to_the_stream_comes_before_the_norm(
    kernels: Any, device: torch.device, float_dtype: torch.dtype
) -> None:
    """The stream that goes on and the one that is normalised are the same numbers, rounded once."""
    rows, stream, weight = (
        _random(*shape, seed=seed).to(float_dtype) for seed, shape in enumerate([(5, 96)] * 2 + [(96,)])
    )
    mine = stream.clone().to(device)
    found = kernels.add_rms_norm(rows.to(device), mine, weight.to(device), 1e-5)
    total = (stream.float() + rows.float()).to(float_dtype)
    assert torch.equal(mine.cpu(), total)
    _assert_near(found, norm_reference.rms_norm(total, weight, 1e-5))


def test_a_row_of_zeros_stays_zero(kernels: Any, device: torch.device) -> None:
    """Padding rows must not become NaN; huge rows must not overflow in half precision."""
    rows = torch.zeros(2, 64, dtype=torch.float16, device=device)
    rows[1] = 60000.0
    found = kernels.rms_norm(rows, torch.ones(64, dtype=torch.float16, device=device), 1e-5)
    assert not found[0].any()
    assert (found[1] - 1).abs().max() < 1e-3


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 48), (2, 1536)])
def test_silu_mul_equals_the_reference(
    kernels: Any, device: torch.device, float_dtype: torch.dtype, rows: int, size: int
) -> None:
    """Gate and up are halves of one row; a wrong half would be another model."""
    data = (_random(rows, 2 * size) * 4).to(float_dtype)
    found = kernels.silu_mul(data.to(device))
    assert found.dtype == float_dtype
    _assert_near(found, gate_reference.silu_mul(data))


def test_the_gate_of_extreme_numbers_is_finite(kernels: Any, device: torch.device) -> None:
    """The exponential of a large negative gate overflows; the result is still zero."""
    data = torch.tensor([[-1e4, 1e4, 0.0, 2.0, 3.0, 4.0]], device=device)
    assert kernels.silu_mul(data).tolist() == [[0.0, 3e4, 0.0]]


@pytest.mark.parametrize(("heads", "head_dim", "rotary_dim"), [(1, 64, 64), (9, 96, 96), (4, 80, 32)])
def test_rotate_equals_the_reference(
    kernels: Any, device: torch.device, float_dtype: torch.dtype, heads: int, head_dim: int, rotary_dim: int
) -> None:
    """Halves are paired, not neighbours; what lies behind the rotated part stays."""
    data = _random(3, heads + 2, head_dim).to(float_dtype)
    angles = _random(40, rotary_dim // 2, seed=1) * 3
    positions = torch.tensor([0, 39, 7], dtype=torch.int32)
    mine = data.clone().to(device)
    kernels.rotate(mine[:, :heads], angles.cos().to(device), angles.sin().to(device), positions.to(device))
    expected = rotary_reference.rotate(data[:, :heads], angles.cos(), angles.sin(), positions)
    _assert_near(mine[:, :heads], expected)
    assert torch.equal(mine[:, heads:].cpu(), data[:, heads:])


def test_wrong_arguments_are_named(kernels: Any, device: torch.device) -> None:
    """A caller must learn which argument does not fit, instead of reading out of bounds."""
    rows, weight = torch.zeros(2, 8, device=device), torch.ones(8, device=device)
    heads, table = torch.zeros(2, 1, 8, device=device), torch.zeros(3, 4, device=device)
    positions = torch.zeros(2, dtype=torch.int32, device=device)
    wrong: list[tuple[str, Any]] = [
        ("weight", lambda: kernels.rms_norm(rows, weight[:4], 1e-5)),
        ("rows: 2 or 3 axes", lambda: kernels.rms_norm(weight, weight, 1e-5)),
        ("rows: dtype", lambda: kernels.rms_norm(rows.double(), weight, 1e-5)),
        ("rows: stride 1", lambda: kernels.rms_norm(torch.zeros(8, 2, device=device).t(), weight, 1e-5)),
        ("stream", lambda: kernels.add_rms_norm(rows, rows[:1], weight, 1e-5)),
        ("even number", lambda: kernels.silu_mul(torch.zeros(2, 3, device=device))),
        ("cosines: 1 to 4 columns", lambda: kernels.rotate(heads, table.repeat(1, 2), table.repeat(1, 2), positions)),
        ("positions", lambda: kernels.rotate(heads, table, table, positions[:1])),
        ("sines", lambda: kernels.rotate(heads, table, table[:2], positions)),
    ]
    for message, call in wrong:
        with pytest.raises(ValueError, match=message):
            call()
