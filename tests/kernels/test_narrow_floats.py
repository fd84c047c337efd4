"""The corrected interpreter against torch, bit for bit; the stock one must fail the same comparison."""

from __future__ import annotations

from typing import Any

import pytest
import torch

COUNT = 64
NARROW = {"bfloat16": torch.bfloat16, "float8_e4m3": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
OPERATIONS = ["add", "subtract", "multiply", "negate", "maximum", "minimum", "less", "absolute"]


@pytest.fixture
def probes(watch: Any, device: torch.device) -> Any:
    """The probe kernels, interpreted with correct arithmetic."""
    if device.type != "cpu":
        pytest.skip("tests the interpreter")
    from tests.kernels import probes

    return probes


def _inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(COUNT, generator=generator).mul(3).to(dtype),
        torch.randn(COUNT, generator=generator).to(dtype),
    )


def _expected(operation: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns the operation in float32, rounded once to the type of `a`."""
    x, y = a.float(), b.float()
    results = {
        "add": x + y,
        "subtract": x - y,
        "multiply": x * y,
        "negate": -x,
        "maximum": torch.maximum(x, y),
        "minimum": torch.minimum(x, y),
        "less": torch.where(x < y, x, y),
        "absolute": x.abs(),
    }
    return results[operation].to(a.dtype)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_arithmetic_rounds_like_the_hardware(probes: Any, name: str, operation: str) -> None:
    """A kernel in bfloat16 is only proved right by an interpreter that computes in bfloat16."""
    a, b = _inputs(NARROW[name])
    out = torch.empty_like(a)
    probes.arithmetic[(1,)](a, b, out, OPERATION=operation, COUNT=COUNT)
    assert torch.equal(_bits(out), _bits(_expected(operation, a, b)))


@pytest.mark.parametrize("name", NARROW)
def test_dot_sums_exact_products_in_float32(probes: Any, name: str) -> None:
    """The heart of attention: bit patterns multiplied as integers would be off by nine orders of magnitude."""
    generator = torch.Generator().manual_seed(6)
    a, b = (torch.randn(16, 16, generator=generator).to(NARROW[name]) for _ in range(2))
    out = torch.empty(16, 16)
    probes.dot[(1,)](a, b, out, COUNT=16)
    assert (out - a.float() @ b.float()).abs().max() <= 1e-5


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("operation", ["sum", "max", "min"])
def test_reductions_compare_values_and_not_bits(probes: Any, name: str, operation: str) -> None:
    """As unsigned integers every negative number is larger than every positive one."""
    a, _ = _inputs(NARROW[name])
    out = torch.empty(1, dtype=torch.float32)
    probes.reduce[(1,)](a, out, OPERATION=operation, COUNT=COUNT)
    exact = {"sum": a.float().sum(), "max": a.float().max(), "min": a.float().min()}[operation]
    rounded = exact.to(a.dtype).float() if operation == "sum" else exact
    assert out.item() == rounded.item()


@pytest.mark.parametrize("name", NARROW)
def test_conversions_round_to_nearest_even(probes: Any, name: str) -> None:
    """Truncation would cost half the precision of what is stored. Ties, subnormal numbers, both zeros."""
    dtype = NARROW[name]
    grid = torch.arange(0x7F if dtype != torch.bfloat16 else 0x7F7F, dtype=torch.int32)
    values = grid.to(torch.int16 if dtype == torch.bfloat16 else torch.uint8).view(dtype).float()
    values = values[torch.isfinite(values)]
    values = values[-2000:] if dtype == torch.bfloat16 else values
    between = torch.cat([values, (values[1:] + values[:-1]) / 2, values[1:] * 0.999, values[1:] * 1.001, -values])
    between = between[: 1 << (len(between).bit_length() - 1)]
    out = torch.empty(len(between), dtype=dtype)
    probes.convert[(1,)](between, out, COUNT=len(between))
    limit = torch.finfo(dtype).max
    wanted = between.clamp(-limit, limit).to(dtype) if dtype != torch.bfloat16 else between.to(dtype)
    assert torch.equal(_bits(out), _bits(wanted))
    back = torch.empty(len(between))
    probes.convert[(1,)](out, back, COUNT=len(between))
    assert torch.equal(back, out.float())


def test_float8_saturates_and_keeps_nan(probes: Any) -> None:
    """The hardware clamps to 448; a conversion that overflows to NaN would poison every later attention."""
    values = torch.tensor([449.0, -1e6, float("inf"), -float("inf"), float("nan"), 464.0, 1e-12, -0.0])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        out = torch.empty(8, dtype=torch.float8_e4m3fn)
        probes.convert[(1,)](values.to(dtype), out, COUNT=8)
        found = out.float()
        assert found[:4].tolist() == [448.0, -448.0, 448.0, -448.0]
        assert found[4].isnan()
        assert found[5:].tolist() == [448.0, 0.0, 0.0]


def test_nan_survives_bfloat16(probes: Any) -> None:
    """Rounding up the bits of a NaN would make it an infinity or zero, and hide that poison was read."""
    bits = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, 0x7FC00000], dtype=torch.int32)
    out = torch.empty(4, dtype=torch.bfloat16)
    probes.convert[(1,)](bits.view(torch.float32), out, COUNT=4)
    assert out.isnan().all()


@pytest.mark.parametrize("name", NARROW)
def test_the_stock_interpreter_is_wrong(monkeypatch: pytest.MonkeyPatch, device: torch.device, name: str) -> None:
    """Negative control: once the stock interpreter passes these comparisons, the correction can go."""
    if device.type != "cpu":
        pytest.skip("tests the interpreter")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from tests.kernels import probes

    a, b = _inputs(NARROW[name])
    for operation in ("add", "multiply"):
        out = torch.empty_like(a)
        probes.arithmetic[(1,)](a, b, out, OPERATION=operation, COUNT=COUNT)
        assert not torch.equal(_bits(out), _bits(_expected(operation, a, b)))
