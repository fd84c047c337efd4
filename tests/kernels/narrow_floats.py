"""Makes Triton's interpreter compute in bfloat16 and float8 as the hardware does.

The interpreter keeps these types as unsigned integers and hands the bit patterns to numpy: sums, products, comparisons
and reductions of them are silently nonsense, and float32 is truncated to bfloat16 where a GPU rounds to nearest even.
Inside `exact_narrow_floats()` every operation widens to float32 (which holds all of these values exactly), computes
there, and rounds once, so a single operation gives the GPU's bits. Written against triton 3.6 and 3.9.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
from typing import Any
import warnings

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle

_FLOAT8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}


def _float8_values(dtype: torch.dtype) -> np.ndarray:
    """Returns the float32 value of each of the 256 bit patterns of `dtype`."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()


_VALUES = {kind: _float8_values(dtype) for kind, dtype in _FLOAT8.items()}


def is_narrow(kind: Any) -> bool:
    """Tells whether the interpreter keeps `kind` as a bit pattern that it cannot compute with."""
    return kind.scalar == tl.bfloat16 or kind.scalar in _FLOAT8


def widen(bits: np.ndarray, kind: Any) -> np.ndarray:
    """Returns the float32 values of bit patterns of `kind`."""
    if kind == tl.bfloat16:
        return (np.asarray(bits, np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return _VALUES[kind][np.asarray(bits, np.uint8)]


def narrow(values: np.ndarray, kind: Any, *, truncate: bool = False) -> np.ndarray:
    """Returns the bit patterns of `kind` nearest to `values`, ties to even.

    float8 saturates: infinities and what is too large become the largest finite number, as `cvt.rn.satfinite` does.
    NaN stays NaN.

    Args:
        values: any float type; float64 is rounded to float32 first, as the compiler does.
        kind: bfloat16 or a float8.
        truncate: round towards zero instead (bfloat16 only).

    Raises:
        NotImplementedError: truncation to float8.
    """
    wide = np.ascontiguousarray(values, dtype=np.float32)
    if kind == tl.bfloat16:
        bits = wide.view(np.uint32)
        if truncate:
            return (bits >> np.uint32(16)).astype(np.uint16)
        half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        rounded = ((bits + half) >> np.uint32(16)).astype(np.uint16)
        return np.where(np.isnan(wide), np.uint16(0x7FFF), rounded)
    if truncate:
        raise NotImplementedError("float8 rounds to nearest even only")
    largest = torch.finfo(_FLOAT8[kind]).max
    tensor = torch.from_numpy(np.clip(wide, -largest, largest))
    return tensor.to(_FLOAT8[kind]).view(torch.uint8).numpy()


def _widened(handle: Any) -> Any:
    """Returns a handle in float32 if `handle` is narrow, else itself."""
    if isinstance(handle, Handle) and is_narrow(handle.dtype):
        return Handle(widen(handle.data, handle.dtype.scalar), tl.float32)
    return handle


def _computes(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps an operation of any number of operands and one numpy function."""

    def operation(self: Any, *operands: Any) -> Any:
        *handles, function = operands
        kind = handles[-1].dtype.scalar
        if not is_narrow(kind):
            return stock(self, *handles, function)
        found = function(*(_widened(handle).data for handle in handles))
        if found.dtype == np.bool_:
            return Handle(found, tl.int1)
        return Handle(narrow(found, kind), kind)

    return operation


def _converts(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a conversion between element types."""

    def conversion(self: Any, source: Any, target_type: Any, *rounding: Any) -> Any:
        origin, target = source.dtype.scalar, target_type.scalar
        truncate = bool(rounding) and rounding[0] == interpreter._ir.ROUNDING_MODE.RTZ
        if is_narrow(target):
            data = _widened(source).data.astype(np.float32)
            return Handle(narrow(data, target, truncate=truncate), target)
        if is_narrow(origin):
            return Handle(_widened(source).data.astype(interpreter._get_np_dtype(target_type)), target)
        if truncate or not (origin.is_floating() and target.is_floating()):
            return stock(self, source, target_type, *rounding)
        return Handle(source.data.astype(interpreter._get_np_dtype(target_type)), target)

    return conversion


def _widens_operands(stock: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Wraps an operation whose result has the type of an operand that is not narrow."""

    def operation(self: Any, *operands: Any) -> Any:
        return stock(self, *(_widened(operand) for operand in operands[:count]), *operands[count:])

    return operation


def _refuses(name: str, stock: Callable[..., Any], at: int) -> Callable[..., Any]:
    """Wraps an operation that cannot be made right here: an error instead of a wrong number."""

    def operation(self: Any, *operands: Any) -> Any:
        if is_narrow(operands[at].dtype):
            raise NotImplementedError(f"{name} of {operands[at].dtype} in the interpreter")
        return stock(self, *operands)

    return operation


def _fma(stock: Callable[..., Any]) -> Callable[..., Any]:
    def operation(self: Any, x: Any, y: Any, z: Any) -> Any:
        if not is_narrow(z.dtype):
            return stock(self, x, y, z)
        # Products of two bfloat16 are exact in float64, so the sum rounds once.
        product = _widened(x).data.astype(np.float64) * _widened(y).data
        kind = z.dtype.scalar
        return Handle(narrow(product + _widened(z).data, kind), kind)

    return operation


def _reduces(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps reductions and scans: in float32, rounded once at the end to the types that went in."""

    def apply(self: Any, inputs: Any) -> Any:
        kinds = [part.dtype.scalar for part in inputs]
        if not any(is_narrow(kind) for kind in kinds):
            return stock(self, inputs)
        found = stock(
            self, tuple(self.to_tensor(_widened(part.handle).data, _widened(part.handle).dtype) for part in inputs)
        )
        parts = list(found) if isinstance(found, (list, tuple)) else [found]
        for index, kind in enumerate(kinds[: len(parts)]):
            if is_narrow(kind):
                shape = parts[index].type.shape if parts[index].type.is_block() else None
                kept = kind if shape is None else tl.block_type(kind, shape)
                parts[index] = tl.tensor(Handle(narrow(parts[index].handle.data, kind), kind), kept)
        return parts

    return apply


def _quietly(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a launch: a GPU does not warn about infinity minus infinity."""

    def launch(self: Any, *args: Any, **options: Any) -> Any:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)
            # Triton 3.6 keeps a scalar argument in an array of one element, also where a loop's bound is asked for.
            warnings.filterwarnings("ignore", "Conversion of an array with ndim > 0", DeprecationWarning)
            return stock(self, *args, **options)

    return launch


@contextlib.contextmanager
def exact_narrow_floats() -> Iterator[None]:
    """Within, interpreted kernels compute bfloat16 and float8 rightly."""
    builder = interpreter.InterpreterBuilder
    with pytest.MonkeyPatch.context() as patch:
        for name in ("binary_op", "unary_op"):
            patch.setattr(builder, name, _computes(getattr(builder, name)))
        for name in ("cast_impl", "create_fp_to_fp"):
            patch.setattr(builder, name, _converts(getattr(builder, name)))
        patch.setattr(builder, "create_dot", _widens_operands(builder.create_dot, 2))
        patch.setattr(builder, "create_fma", _fma(builder.create_fma))
        for name, at in (("create_erf", 0), ("create_rsqrt", 0), ("create_atomic_rmw", 2), ("create_histogram", 0)):
            patch.setattr(builder, name, _refuses(name, getattr(builder, name), at))
        if hasattr(builder, "create_clampf"):
            patch.setattr(builder, "create_clampf", _refuses("create_clampf", builder.create_clampf, 0))
        for operations in (interpreter.ReduceOps, interpreter.ScanOps):
            patch.setattr(operations, "apply_impl", _reduces(operations.apply_impl))
        patch.setattr(interpreter.GridExecutor, "__call__", _quietly(interpreter.GridExecutor.__call__))
        yield
