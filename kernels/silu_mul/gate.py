"""Triton: a run of a row to a program."""

import torch
import triton
import triton.language as tl

from kernels.checks import check_dtype, check_last_axis_dense, check_shape
from kernels.configs import lookup
from kernels.layout import ACTIVATION_DTYPES


@triton.jit
def _silu_mul(gate_up_ptr, out_ptr, stride_in: tl.int64, stride_out: tl.int64, SIZE: tl.constexpr, RUN: tl.constexpr):
    """Grid (row, run)."""
    row = tl.program_id(0)
    elements = tl.program_id(1) * RUN + tl.arange(0, RUN)
    mask = elements < SIZE
    gate = tl.load(gate_up_ptr + row * stride_in + elements, mask=mask, other=0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride_in + SIZE + elements, mask=mask, other=0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * stride_out + elements, result.to(out_ptr.dtype.element_ty), mask=mask)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Returns `silu(gate) * up`.

    Args:
        gate_up: `[row, 2 * size]`, gate before up, dense in the last axis; float32, bfloat16 or float16.

    Returns:
        `[row, size]`, dtype of `gate_up`.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    check_shape("gate_up", gate_up, (None, None))
    check_dtype("gate_up", gate_up, ACTIVATION_DTYPES)
    check_last_axis_dense("gate_up", gate_up)
    row_count, width = gate_up.shape
    if width % 2:
        message = f"gate_up: an even number of columns expected, found {width}"
        raise ValueError(message)
    out = torch.empty(row_count, width // 2, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel() == 0:
        return out
    config = lookup("silu_mul", gate_up.device, size=width // 2)
    run = min(config["elements"], triton.next_power_of_2(width // 2))
    _silu_mul[(row_count, triton.cdiv(width // 2, run))](
        gate_up, out, gate_up.stride(0), out.stride(0), SIZE=width // 2, RUN=run, num_warps=config["num_warps"]
    )
    return out
