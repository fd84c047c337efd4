"""Triton: merges finished results of attention over two disjoint sets of positions.

With outputs o1, o2 and logarithms of sums of exponentials l1, l2:

    l = log(e^l1 + e^l2),  o = e^(l1 - l) o1 + e^(l2 - l) o2

Source: "Cascade Inference" (Ye et al., 2024). An l of -inf is a result over nothing, whose output does not matter.
"""

import torch
import triton
import triton.language as tl

from kernels.checks import check_dtype, check_same_device, check_shape
from kernels.layout import ACTIVATION_DTYPES
from kernels.paged_attention.options import check_outputs

_ROWS = 16
"""Rows of a program."""


@triton.jit
def _merge_states(
    first_ptr,
    first_lse_ptr,
    second_ptr,
    second_lse_ptr,
    out_ptr,
    lse_ptr,
    row_count,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid (ceil(rows / ROWS)); a row is one head of one token."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, DIMS)
    row_mask = rows < row_count
    mask = row_mask[:, None] & (dims < HEAD_DIM)[None, :]
    offsets = rows.to(tl.int64)[:, None] * HEAD_DIM + dims[None, :]
    first_lse = tl.load(first_lse_ptr + rows, mask=row_mask, other=float("-inf"))
    second_lse = tl.load(second_lse_ptr + rows, mask=row_mask, other=float("-inf"))
    top = tl.maximum(first_lse, second_lse)
    safe_top = tl.where(top == float("-inf"), 0.0, top)
    first_weight = tl.exp(first_lse - safe_top)
    second_weight = tl.exp(second_lse - safe_top)
    total = first_weight + second_weight
    divisor = tl.where(total == 0.0, 1.0, total)
    # A result over nothing may hold anything: it is not loaded.
    first = tl.load(first_ptr + offsets, mask=mask & (first_lse != float("-inf"))[:, None], other=0.0)
    second = tl.load(second_ptr + offsets, mask=mask & (second_lse != float("-inf"))[:, None], other=0.0)
    merged = first.to(tl.float32) * first_weight[:, None] + second.to(tl.float32) * second_weight[:, None]
    tl.store(out_ptr + offsets, (merged / divisor[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + rows, tl.where(total == 0.0, float("-inf"), safe_top + tl.log(divisor)), mask=row_mask)


def merge_states(
    first: torch.Tensor, first_lse: torch.Tensor, second: torch.Tensor, second_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges two results of attention for the same queries.

    Args:
        first: `[token, query_head, head_dim]`, contiguous: over some positions.
        first_lse: `[token, query_head]` float32, contiguous: natural logarithm of the sum of exponentials of the
            scores; -inf where there was nothing to see.
        second: like `first`, over other positions.
        second_lse: like `first_lse`.

    Returns:
        Output and logarithm over both sets of positions; zeros and -inf where there was nothing in either.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    check_shape("first", first, (None, None, None))
    check_dtype("first", first, ACTIVATION_DTYPES)
    check_outputs(first, second, None)
    for name, tensor in (("first_lse", first_lse), ("second_lse", second_lse)):
        check_shape(name, tensor, first.shape[:2])
        check_dtype(name, tensor, (torch.float32,))
    tensors = {"first": first, "first_lse": first_lse, "second": second, "second_lse": second_lse}
    check_same_device(**tensors)
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            message = f"{name}: a contiguous tensor expected, found strides {tensor.stride()}"
            raise ValueError(message)
    out, lse = torch.empty_like(first), torch.empty_like(first_lse)
    row_count, head_dim = first.shape[0] * first.shape[1], first.shape[2]
    if row_count:
        _merge_states[(triton.cdiv(row_count, _ROWS),)](
            first, first_lse, second, second_lse, out, lse, row_count,
            HEAD_DIM=head_dim, DIMS=triton.next_power_of_2(head_dim), ROWS=_ROWS, num_warps=4,
        )  # fmt: skip
    return out, lse
