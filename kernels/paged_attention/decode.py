"""Triton: one query a sequence, its context split over programs, then merged.

Every split has SPLIT positions and the merge goes through them in order, so a result does not depend on what else is
in the batch.
"""

import torch
import triton
import triton.language as tl

from kernels.checks import check_cache, check_dtype, check_same_device, check_shape, group_size
from kernels.layout import KV_DTYPES

SPLIT = 512
"""Positions that one program attends to."""
_TILE = 64
_LOG2_E = 1.4426950408889634


@triton.jit
def _decode_split(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    len_ptr,
    part_out_ptr,
    part_max_ptr,
    part_sum_ptr,
    scale_log2,
    stride_q_token,
    stride_q_head,
    stride_k_block: tl.int64,
    stride_k_head,
    stride_k_slot,
    stride_v_block: tl.int64,
    stride_v_head,
    stride_v_slot,
    stride_table,
    split_count,
    WINDOW: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT_SIZE: tl.constexpr,
):
    """Grid (sequence, kv_head, split): all query heads of one kv head over one split."""
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(len_ptr + sequence)
    first = split * SPLIT_SIZE
    if first >= length:
        return
    last = tl.minimum(first + SPLIT_SIZE, length)
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIMS)
    row_mask = rows < GROUP
    dim_mask = dims < HEAD_DIM
    heads = kv_head * GROUP + rows
    q = tl.load(
        q_ptr + sequence.to(tl.int64) * stride_q_token + heads[:, None] * stride_q_head + dims[None, :],
        mask=row_mask[:, None] & dim_mask[None, :],
        other=0.0,
    )
    running_max = tl.full([ROWS], float("-inf"), tl.float32)
    running_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIMS], tl.float32)
    for start in range(first, last, TILE):
        positions = start + tl.arange(0, TILE)
        seen = positions < last
        if WINDOW > 0:
            seen = seen & (positions >= length - WINDOW)
        blocks = tl.load(table_ptr + sequence.to(tl.int64) * stride_table + positions // BLOCK_SIZE, mask=seen, other=0)
        blocks = blocks.to(tl.int64)
        slots = positions % BLOCK_SIZE
        k_offsets = blocks * stride_k_block + kv_head * stride_k_head + slots * stride_k_slot
        v_offsets = blocks * stride_v_block + kv_head * stride_v_head + slots * stride_v_slot
        k = tl.load(k_ptr + k_offsets[None, :] + dims[:, None], mask=seen[None, :] & dim_mask[:, None], other=0.0)
        v = tl.load(v_ptr + v_offsets[:, None] + dims[None, :], mask=seen[:, None] & dim_mask[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scale_log2
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        # Nothing seen yet: -inf minus -inf would be NaN.
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - safe_max[:, None])
        rescale = tl.exp2(running_max - safe_max)
        running_sum = running_sum * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        running_max = new_max
    part = (sequence.to(tl.int64) * NUM_HEADS + heads) * split_count + split
    tl.store(part_max_ptr + part, running_max, mask=row_mask)
    tl.store(part_sum_ptr + part, running_sum, mask=row_mask)
    tl.store(part_out_ptr + part[:, None] * HEAD_DIM + dims[None, :], acc, mask=row_mask[:, None] & dim_mask[None, :])


@triton.jit
def _decode_merge(
    part_out_ptr,
    part_max_ptr,
    part_sum_ptr,
    len_ptr,
    out_ptr,
    stride_out_token,
    stride_out_head,
    split_count,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    SPLIT_SIZE: tl.constexpr,
):
    """Grid (sequence, query_head): adds up the splits in order."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    length = tl.load(len_ptr + sequence)
    dims = tl.arange(0, DIMS)
    dim_mask = dims < HEAD_DIM
    base = (sequence.to(tl.int64) * NUM_HEADS + head) * split_count
    running_max = float("-inf")
    running_sum = 0.0
    acc = tl.zeros([DIMS], tl.float32)
    for split in range(tl.cdiv(length, SPLIT_SIZE)):
        part_max = tl.load(part_max_ptr + base + split)
        new_max = tl.maximum(running_max, part_max)
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        rescale = tl.exp2(running_max - safe_max)
        weight = tl.exp2(part_max - safe_max)
        running_sum = running_sum * rescale + tl.load(part_sum_ptr + base + split) * weight
        part = tl.load(part_out_ptr + (base + split) * HEAD_DIM + dims, mask=dim_mask, other=0.0)
        acc = acc * rescale + part * weight
        running_max = new_max
    # A sum of zero is an empty row. NaN is not: what was read wrongly must be seen, not turned into zeros.
    empty = running_sum == 0.0
    result = tl.where(empty, 0.0, acc / tl.where(empty, 1.0, running_sum))
    tl.store(
        out_ptr + sequence.to(tl.int64) * stride_out_token + head * stride_out_head + dims,
        result.to(out_ptr.dtype.element_ty),
        mask=dim_mask,
    )


def paged_attention_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    max_context_len: int,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """Attends one query a sequence to its cached keys and values.

    Args:
        q: `[sequence, query_head, head_dim]`, dense in the last axis.
        k_cache: `[block, kv_head, block_size, head_dim]`, dtype of `q`, dense in the last axis.
        v_cache: like `k_cache`.
        block_tables: `[sequence, block_max]` int32; entries past a sequence's last block are unread.
        context_lens: `[sequence]` int32, cached tokens, the query's own included; 0 for padding.
        max_context_len: at least the largest of `context_lens`.
        scale: factor on the scores.
        window: the query sees this many positions, its own included; 0 for all.

    Returns:
        `[sequence, query_head, head_dim]`, dtype of `q`; accumulated in float32. Rows of length 0 are zero.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    sequence_count, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    group = group_size(num_heads, num_kv_heads)
    check_dtype("q", q, KV_DTYPES)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_cache(name, cache, num_kv_heads, head_dim)
        check_dtype(name, cache, (q.dtype,))
    check_shape("block_tables", block_tables, (sequence_count, None))
    check_shape("context_lens", context_lens, (sequence_count,))
    check_dtype("block_tables", block_tables, (torch.int32,))
    check_same_device(q=q, k_cache=k_cache, v_cache=v_cache, block_tables=block_tables, context_lens=context_lens)
    out = torch.empty_like(q)
    split_count = max(1, triton.cdiv(max_context_len, SPLIT))
    part_out = torch.empty(sequence_count, num_heads, split_count, head_dim, dtype=torch.float32, device=q.device)
    part_max = torch.empty(sequence_count, num_heads, split_count, dtype=torch.float32, device=q.device)
    part_sum = torch.empty_like(part_max)
    dims = max(16, triton.next_power_of_2(head_dim))
    _decode_split[(sequence_count, num_kv_heads, split_count)](
        q, k_cache, v_cache, block_tables, context_lens, part_out, part_max, part_sum, scale * _LOG2_E,
        q.stride(0), q.stride(1),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        v_cache.stride(0), v_cache.stride(1), v_cache.stride(2),
        block_tables.stride(0), split_count,
        WINDOW=window, NUM_HEADS=num_heads, GROUP=group, ROWS=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim, DIMS=dims, BLOCK_SIZE=block_size, TILE=_TILE, SPLIT_SIZE=SPLIT,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    _decode_merge[(sequence_count, num_heads)](
        part_out, part_max, part_sum, context_lens, out, out.stride(0), out.stride(1), split_count,
        NUM_HEADS=num_heads, HEAD_DIM=head_dim, DIMS=dims, SPLIT_SIZE=SPLIT, num_warps=2,
    )  # fmt: skip
    return out
