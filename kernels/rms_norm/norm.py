"""Triton: rows stay in registers between the sum of squares and the scaling."""

import torch
import triton
import triton.language as tl

from kernels.checks import check_dtype, check_last_axis_dense, check_same_device, check_shape
from kernels.configs import lookup
from kernels.layout import ACTIVATION_DTYPES


@triton.jit
def _rms_norm(
    rows_ptr,
    stream_ptr,
    weight_ptr,
    out_ptr,
    row_count,
    stride_rows: tl.int64,
    stride_rows_head,
    stride_stream: tl.int64,
    stride_out: tl.int64,
    stride_out_head,
    eps,
    ADD: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid (group of ROWS rows,); a row is one head of one row where there are heads."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, DIMS)
    mask = (rows < row_count)[:, None] & (dims < SIZE)[None, :]
    outer, head = rows // HEADS, rows % HEADS
    x = tl.load(rows_ptr + (outer * stride_rows + head * stride_rows_head)[:, None] + dims[None, :], mask=mask, other=0)
    x = x.to(tl.float32)
    if ADD:
        stream_at = stream_ptr + (rows * stride_stream)[:, None] + dims[None, :]
        total = (x + tl.load(stream_at, mask=mask, other=0).to(tl.float32)).to(stream_ptr.dtype.element_ty)
        tl.store(stream_at, total, mask=mask)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / SIZE + eps)
    normal = (x * scale[:, None]).to(out_ptr.dtype.element_ty).to(tl.float32)
    weight = tl.load(weight_ptr + dims, mask=dims < SIZE, other=0).to(tl.float32)
    out_at = out_ptr + (outer * stride_out + head * stride_out_head)[:, None] + dims[None, :]
    tl.store(out_at, (normal * weight[None, :]).to(out_ptr.dtype.element_ty), mask=mask)


def _launch(rows: torch.Tensor, stream: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Checks what both forms share, launches, and returns the result."""
    size = rows.shape[-1]
    check_shape("weight", weight, (size,))
    check_dtype("rows", rows, ACTIVATION_DTYPES)
    check_dtype("weight", weight, ACTIVATION_DTYPES)
    check_last_axis_dense("rows", rows)
    check_same_device(rows=rows, weight=weight)
    out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    row_count = rows.numel() // size if size else 0
    if row_count == 0:
        return out
    heads = rows.shape[1] if rows.dim() == 3 else 1  # noqa: PLR2004 - [row, head, size]
    config = lookup("rms_norm", rows.device, size=size)
    dims = triton.next_power_of_2(size)
    per_program = min(max(1, config["elements"] // dims), triton.next_power_of_2(row_count))
    _rms_norm[(triton.cdiv(row_count, per_program),)](
        rows, rows if stream is None else stream, weight, out, row_count,
        rows.stride(0), rows.stride(1) if heads > 1 else 0, 0 if stream is None else stream.stride(0),
        out.stride(0), out.stride(1) if heads > 1 else 0, eps,
        ADD=stream is not None, HEADS=heads, SIZE=size, DIMS=dims, ROWS=per_program, num_warps=config["num_warps"],
    )  # fmt: skip
    return out


def rms_norm(rows: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalises over the last axis.

    Args:
        rows: `[row, size]` or `[row, head, size]`, dense in the last axis; float32, bfloat16 or float16.
        weight: `[size]`.
        eps: added to the mean of the squares.

    Returns:
        Like `rows`, contiguous.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    if rows.dim() not in {2, 3}:
        message = f"rows: 2 or 3 axes expected, found shape {list(rows.shape)}"
        raise ValueError(message)
    return _launch(rows, None, weight, eps)


def add_rms_norm(rows: torch.Tensor, stream: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Adds `rows` to `stream` and normalises the sum. Writes `stream`.

    Args:
        rows: `[row, size]`, dense in the last axis; float32, bfloat16 or float16.
        stream: like `rows`: the residual stream.
        weight: `[size]`.
        eps: added to the mean of the squares.

    Returns:
        Like `rows`, contiguous.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    check_shape("rows", rows, (None, None))
    check_shape("stream", stream, rows.shape)
    check_dtype("stream", stream, (rows.dtype,))
    check_last_axis_dense("stream", stream)
    check_same_device(rows=rows, stream=stream)
    return _launch(rows, stream, weight, eps)
