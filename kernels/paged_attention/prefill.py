"""Triton: chunks of prompts attend to the paged cache, which already holds their own keys and values."""

import torch
import triton
import triton.language as tl

from kernels.checks import check_cache, check_dtype, check_same_device, check_shape, group_size
from kernels.layout import KV_DTYPES

_LOG2_E = 1.4426950408889634
_ROWS = 64
_TILE = 32


@triton.jit
def _prefill(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    len_ptr,
    start_ptr,
    out_ptr,
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
    stride_out_token,
    stride_out_head,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (row block, kv_head, sequence). A row is one query head of the kv head at one token."""
    row_block = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = tl.program_id(2)
    start = tl.load(start_ptr + sequence)
    query_count = tl.load(start_ptr + sequence + 1) - start
    if (row_block * ROWS) // GROUP >= query_count:
        return
    length = tl.load(len_ptr + sequence)
    first_position = length - query_count
    rows = row_block * ROWS + tl.arange(0, ROWS)
    tokens = rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    dims = tl.arange(0, DIMS)
    row_mask = tokens < query_count
    dim_mask = dims < HEAD_DIM
    mask = row_mask[:, None] & dim_mask[None, :]
    token_offsets = (start + tokens).to(tl.int64)
    q = tl.load(
        q_ptr + token_offsets[:, None] * stride_q_token + heads[:, None] * stride_q_head + dims[None, :],
        mask=mask,
        other=0.0,
    )
    query_positions = first_position + tokens
    end = tl.minimum(first_position + (row_block * ROWS + ROWS - 1) // GROUP + 1, length)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(first_position + (row_block * ROWS) // GROUP - WINDOW + 1, 0) // TILE * TILE
    running_max = tl.full([ROWS], float("-inf"), tl.float32)
    running_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIMS], tl.float32)
    for tile in range(begin, end, TILE):
        positions = tile + tl.arange(0, TILE)
        valid = positions < end
        blocks = tl.load(
            table_ptr + sequence.to(tl.int64) * stride_table + positions // BLOCK_SIZE, mask=valid, other=0
        )
        blocks = blocks.to(tl.int64)
        slots = positions % BLOCK_SIZE
        k_offsets = blocks * stride_k_block + kv_head * stride_k_head + slots * stride_k_slot
        v_offsets = blocks * stride_v_block + kv_head * stride_v_head + slots * stride_v_slot
        k = tl.load(k_ptr + k_offsets[None, :] + dims[:, None], mask=valid[None, :] & dim_mask[:, None], other=0.0)
        v = tl.load(v_ptr + v_offsets[:, None] + dims[None, :], mask=valid[:, None] & dim_mask[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scale_log2
        seen = positions[None, :] <= query_positions[:, None]
        if WINDOW > 0:
            seen = seen & (query_positions[:, None] - positions[None, :] < WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - safe_max[:, None])
        rescale = tl.exp2(running_max - safe_max)
        running_sum = running_sum * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        running_max = new_max
    out = acc / tl.where(running_sum == 0.0, 1.0, running_sum)[:, None]
    tl.store(
        out_ptr + token_offsets[:, None] * stride_out_token + heads[:, None] * stride_out_head + dims[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=mask,
    )


def paged_attention_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_starts: torch.Tensor,
    max_query_count: int,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """Attends the last queries of each sequence to its cached keys and values, causally.

    Args:
        q: `[token, query_head, head_dim]`, the sequences' new tokens one after the other, dense in the last axis.
        k_cache: `[block, kv_head, block_size, head_dim]`, dtype of `q`, dense in the last axis.
        v_cache: like `k_cache`.
        block_tables: `[sequence, block_max]` int32; entries past a sequence's last block are unread.
        context_lens: `[sequence]` int32, cached tokens of each, its new ones included.
        query_starts: `[sequence + 1]` int32, where each sequence's queries begin in `q`.
        max_query_count: at least the largest number of queries of a sequence.
        scale: factor on the scores.
        window: each query sees this many positions, its own included; 0 for all.

    Returns:
        `[token, query_head, head_dim]`, dtype of `q`; accumulated in float32. Tokens of no sequence are unspecified.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    _, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    sequence_count = context_lens.shape[0]
    group = group_size(num_heads, num_kv_heads)
    check_dtype("q", q, KV_DTYPES)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_cache(name, cache, num_kv_heads, head_dim)
        check_dtype(name, cache, (q.dtype,))
    check_shape("block_tables", block_tables, (sequence_count, None))
    check_shape("query_starts", query_starts, (sequence_count + 1,))
    check_dtype("block_tables", block_tables, (torch.int32,))
    check_same_device(q=q, k_cache=k_cache, v_cache=v_cache, block_tables=block_tables, context_lens=context_lens)
    out = torch.empty_like(q)
    grid = (max(1, triton.cdiv(max_query_count * group, _ROWS)), num_kv_heads, sequence_count)
    _prefill[grid](
        q, k_cache, v_cache, block_tables, context_lens, query_starts, out, scale * _LOG2_E,
        q.stride(0), q.stride(1),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        v_cache.stride(0), v_cache.stride(1), v_cache.stride(2),
        block_tables.stride(0), out.stride(0), out.stride(1),
        WINDOW=window, GROUP=group, ROWS=_ROWS, HEAD_DIM=head_dim, DIMS=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_SIZE=block_size, TILE=_TILE, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out
