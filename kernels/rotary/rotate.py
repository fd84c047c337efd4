"""Triton: some heads of a row to a program."""

import torch
import triton
import triton.language as tl

from kernels.checks import check_dtype, check_last_axis_dense, check_same_device, check_shape
from kernels.configs import lookup
from kernels.layout import ACTIVATION_DTYPES


@triton.jit
def _rotate(
    heads_ptr,
    cosine_ptr,
    sine_ptr,
    position_ptr,
    stride_row: tl.int64,
    stride_head,
    stride_table,
    HEAD_COUNT: tl.constexpr,
    HALF: tl.constexpr,
    DIMS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Grid (row, group of HEADS heads)."""
    row = tl.program_id(0)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dims = tl.arange(0, DIMS)
    position = tl.load(position_ptr + row).to(tl.int64)
    in_half = dims < HALF
    cosine = tl.load(cosine_ptr + position * stride_table + dims, mask=in_half, other=0)[None, :]
    sine = tl.load(sine_ptr + position * stride_table + dims, mask=in_half, other=0)[None, :]
    at = heads_ptr + row * stride_row + heads[:, None] * stride_head + dims[None, :]
    mask = (heads < HEAD_COUNT)[:, None] & in_half[None, :]
    first = tl.load(at, mask=mask, other=0).to(tl.float32)
    second = tl.load(at + HALF, mask=mask, other=0).to(tl.float32)
    tl.store(at, (first * cosine - second * sine).to(heads_ptr.dtype.element_ty), mask=mask)
    tl.store(at + HALF, (second * cosine + first * sine).to(heads_ptr.dtype.element_ty), mask=mask)


def check_rotary(
    heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, positions: torch.Tensor
) -> tuple[int, int, int]:
    """Checks the arguments of a rotation and returns (rows, heads, head_dim).

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    check_shape("heads", heads, (None, None, None))
    row_count, head_count, head_dim = heads.shape
    check_shape("cosines", cosines, (None, None))
    check_shape("sines", sines, cosines.shape)
    check_shape("positions", positions, (row_count,))
    if not 0 < 2 * cosines.shape[1] <= head_dim:
        message = f"cosines: 1 to {head_dim // 2} columns expected, half of what is rotated, found {cosines.shape[1]}"
        raise ValueError(message)
    check_dtype("heads", heads, ACTIVATION_DTYPES)
    check_dtype("positions", positions, (torch.int32, torch.int64))
    for name, table in (("cosines", cosines), ("sines", sines)):
        check_dtype(name, table, (torch.float32,))
        if not table.is_contiguous():
            message = f"{name}: a contiguous tensor expected, found strides {table.stride()}"
            raise ValueError(message)
    check_last_axis_dense("heads", heads)
    check_same_device(heads=heads, cosines=cosines, sines=sines, positions=positions)
    return row_count, head_count, head_dim


def rotate(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, positions: torch.Tensor) -> None:
    """Turns element i of each head with element i + rotary_dim / 2. Writes `heads`.

    Args:
        heads: `[row, head, head_dim]`, dense in the last axis; float32, bfloat16 or float16.
        cosines: `[position, rotary_dim / 2]` float32, contiguous, rotary_dim <= head_dim.
        sines: like `cosines`.
        positions: `[row]` int32 or int64, each a row of the tables.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    row_count, head_count, head_dim = check_rotary(heads, cosines, sines, positions)
    if row_count == 0 or head_count == 0:
        return
    half = cosines.shape[1]
    dims = triton.next_power_of_2(half)
    config = lookup("rotate", heads.device, head_dim=head_dim)
    per_program = min(max(1, config["elements"] // dims), triton.next_power_of_2(head_count))
    _rotate[(row_count, triton.cdiv(head_count, per_program))](
        heads, cosines, sines, positions, heads.stride(0), heads.stride(1), cosines.stride(0),
        HEAD_COUNT=head_count, HALF=half, DIMS=dims, HEADS=per_program, num_warps=config["num_warps"],
    )  # fmt: skip
