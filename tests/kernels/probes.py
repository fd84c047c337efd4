"""Small kernels that the tests of the test tools run, sound ones and faulty ones."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def arithmetic(a_ptr, b_ptr, out_ptr, OPERATION: tl.constexpr, COUNT: tl.constexpr):  # noqa: ANN001, ANN201, N803
    """One operation on two vectors, in their own type."""
    lanes = tl.arange(0, COUNT)
    a = tl.load(a_ptr + lanes)
    b = tl.load(b_ptr + lanes)
    if OPERATION == "add":
        found = a + b
    elif OPERATION == "subtract":
        found = a - b
    elif OPERATION == "multiply":
        found = a * b
    elif OPERATION == "negate":
        found = -a
    elif OPERATION == "maximum":
        found = tl.maximum(a, b)
    elif OPERATION == "minimum":
        found = tl.minimum(a, b)
    elif OPERATION == "less":
        found = tl.where(a < b, a, b)
    else:
        found = tl.abs(a)
    tl.store(out_ptr + lanes, found.to(out_ptr.dtype.element_ty))


@triton.jit
def convert(a_ptr, out_ptr, COUNT: tl.constexpr):  # noqa: ANN001, ANN201, N803
    """From one type to another."""
    lanes = tl.arange(0, COUNT)
    tl.store(out_ptr + lanes, tl.load(a_ptr + lanes).to(out_ptr.dtype.element_ty))


@triton.jit
def reduce(a_ptr, out_ptr, OPERATION: tl.constexpr, COUNT: tl.constexpr):  # noqa: ANN001, ANN201, N803
    """A vector to one number."""
    a = tl.load(a_ptr + tl.arange(0, COUNT))
    found = tl.sum(a, 0) if OPERATION == "sum" else tl.max(a, 0) if OPERATION == "max" else tl.min(a, 0)
    tl.store(out_ptr, found.to(out_ptr.dtype.element_ty))


@triton.jit
def dot(a_ptr, b_ptr, out_ptr, COUNT: tl.constexpr):  # noqa: ANN001, ANN201, N803
    """A product of two square matrices, summed in float32."""
    at = tl.arange(0, COUNT)[:, None] * COUNT + tl.arange(0, COUNT)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@triton.jit
def copy_rows(a_ptr, out_ptr, stride_a, stride_out, shift, COUNT: tl.constexpr):  # noqa: ANN001, ANN201, N803
    """Grid (row,): copies a row, `shift` elements too far when that is not 0."""
    row = tl.program_id(0)
    lanes = tl.arange(0, COUNT)
    tl.store(out_ptr + row * stride_out + lanes, tl.load(a_ptr + row * stride_a + shift + lanes))


@triton.jit
def store_all_to(out_ptr, modulus, COUNT: tl.constexpr):  # noqa: ANN001, ANN201, N803
    """Grid (any,): each lane stores to its own number modulo `modulus`, the same in each program."""
    lanes = tl.arange(0, COUNT)
    tl.store(out_ptr + lanes % modulus, lanes.to(tl.float32))


@triton.jit
def pass_on(out_ptr):  # noqa: ANN001, ANN201
    """Grid (any,): each program but the first adds to what its neighbour stores."""
    program = tl.program_id(0)
    before = tl.load(out_ptr + program - 1, mask=program > 0, other=0.0)
    tl.store(out_ptr + program, before + 1.0)


@triton.jit
def count(out_ptr):  # noqa: ANN001, ANN201
    """Grid (any,): every program adds one to one number, atomically."""
    tl.atomic_add(out_ptr, 1.0)
