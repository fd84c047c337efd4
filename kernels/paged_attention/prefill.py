"""Triton: chunks of prompts attend to the paged cache, which already holds their own keys and values."""

import torch
import triton
import triton.language as tl

from kernels.checks import check_dtype, check_same_device, check_shape
from kernels.paged_attention.configs import prefill_config
from kernels.paged_attention.kv_loop import attend_tiles, store_rows
from kernels.paged_attention.options import AttentionOptions, check_attention, check_outputs
from kernels.paged_attention.prefill_split import PrefillWorkspace, launch_split
from kernels.paged_attention.row_blocks import find_sequence


@triton.jit(do_not_specialize=["sequence_count"], do_not_specialize_on_alignment=["start_ptr", "len_ptr", "table_ptr"])
def _prefill(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    len_ptr,
    start_ptr,
    sinks_ptr,
    out_ptr,
    lse_ptr,
    sequence_count,
    score_factor,
    cap_log2,
    v_scale,
    stride_q_token,
    stride_q_head,
    stride_k_block: tl.int64,
    stride_k_head: tl.int64,
    stride_k_slot,
    stride_v_block: tl.int64,
    stride_v_head: tl.int64,
    stride_v_slot,
    stride_table,
    stride_out_token,
    stride_out_head,
    stride_lse_token,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (row block, kv_head). A row is one query head of the kv head at one token.

    Row blocks are numbered from the end: the last ones of a prompt have most to do and begin first.
    """
    kv_head = tl.program_id(1)
    origin = tl.load(start_ptr)
    row_block = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence, first_block = find_sequence(start_ptr, sequence_count, row_block, origin, GROUP, ROWS)
    query_start = tl.load(start_ptr + sequence)
    query_count = tl.load(start_ptr + sequence + 1) - query_start
    first_row = (row_block - first_block) * ROWS
    if first_row >= query_count * GROUP:
        return
    length = tl.load(len_ptr + sequence)
    rows = first_row + tl.arange(0, ROWS)
    tokens = rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    dims = tl.arange(0, DIMS)
    row_mask = tokens < query_count
    mask = row_mask[:, None] & (dims < HEAD_DIM)[None, :]
    token_rows = (query_start + tokens).to(tl.int64)
    q_ptrs = q_ptr + token_rows[:, None] * stride_q_token + heads[:, None] * stride_q_head + dims[None, :]
    q = tl.load(q_ptrs, mask=mask, other=0.0)
    first_position = length - query_count
    row_ceiling = first_position + tokens
    row_floor = row_ceiling - WINDOW + 1
    lowest = first_position + first_row // GROUP
    highest = tl.minimum(first_position + (first_row + ROWS - 1) // GROUP, length - 1)
    end = highest + 1
    # Tiles before `open_end` hide nothing from any row's causal mask, those from `open_begin` nothing from its window.
    begin = 0
    open_begin = 0
    if WINDOW > 0:
        begin = tl.maximum(lowest - WINDOW + 1, 0) // TILE
        open_begin = tl.cdiv(tl.maximum(highest - WINDOW + 1, 0), TILE)
    last = tl.cdiv(end, TILE)
    open_end = tl.maximum((lowest + 1) // TILE, open_begin)
    open_end = tl.minimum(open_end, last)
    open_begin = tl.minimum(open_begin, open_end)
    state_max = tl.full([ROWS], float("-inf"), tl.float32)
    state_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIMS], tl.float32)
    k_head_ptr = k_ptr + kv_head * stride_k_head
    v_head_ptr = v_ptr + kv_head * stride_v_head
    sequence_table_ptr = table_ptr + sequence.to(tl.int64) * stride_table
    if WINDOW > 0:
        state_max, state_sum, acc = attend_tiles(
            q, state_max, state_sum, acc, k_head_ptr, v_head_ptr, sequence_table_ptr, begin, open_begin, 0, end,
            row_floor, row_ceiling, score_factor, cap_log2,
            stride_k_block, stride_k_slot, stride_v_block, stride_v_slot,
            SOFT_CAP, True, True, True, False, HEAD_DIM, DIMS, BLOCK_SIZE, TILE,
        )  # fmt: skip
    state_max, state_sum, acc = attend_tiles(
        q, state_max, state_sum, acc, k_head_ptr, v_head_ptr, sequence_table_ptr, open_begin, open_end, 0, end,
        row_floor, row_ceiling, score_factor, cap_log2,
        stride_k_block, stride_k_slot, stride_v_block, stride_v_slot,
        SOFT_CAP, False, False, False, False, HEAD_DIM, DIMS, BLOCK_SIZE, TILE,
    )  # fmt: skip
    state_max, state_sum, acc = attend_tiles(
        q, state_max, state_sum, acc, k_head_ptr, v_head_ptr, sequence_table_ptr, open_end, last, 0, end,
        row_floor, row_ceiling, score_factor, cap_log2,
        stride_k_block, stride_k_slot, stride_v_block, stride_v_slot,
        SOFT_CAP, True, WINDOW > 0, True, False, HEAD_DIM, DIMS, BLOCK_SIZE, TILE,
    )  # fmt: skip
    store_rows(
        state_max, state_sum, acc, v_scale, row_mask, sinks_ptr + heads,
        out_ptr + token_rows * stride_out_token + heads * stride_out_head,
        lse_ptr + token_rows * stride_lse_token + heads, HAS_SINKS, HAS_LSE, HEAD_DIM, DIMS,
    )  # fmt: skip


def paged_attention_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_starts: torch.Tensor,
    options: AttentionOptions,
    workspace: PrefillWorkspace | None = None,
    *,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attends the last queries of each sequence to its cached keys and values, causally.

    The grid follows from the shapes of the arguments alone; nothing waits for the device.

    Args:
        q: `[token, query_head, head_dim]`, the sequences' new tokens one after the other, dense in the last axis.
        k_cache: `[block, kv_head, block_size, head_dim]`, dtype of `q` or float8_e4m3fn, dense in the last axis.
        v_cache: like `k_cache`.
        block_tables: `[sequence, block_max]` int32; entries past a sequence's last block are unread.
        context_lens: `[sequence]` int32, cached tokens of each, its new ones included; at least its queries.
        query_starts: `[sequence + 1]` int32, where each sequence's queries begin in `q`; equal for one that has none.
            The first need not be 0, nor the last the number of tokens: rows outside belong to nobody.
        options: scale, window and the like.
        workspace: scratch in which few row blocks over long contexts are shared out, after `workspace.refresh`;
            written. None for results that do not depend on company: what a row sees is then added up tile by tile.
        out: where the result goes; None for a new tensor.
        lse: `[token, query_head]` float32, written: natural logarithm of the sum of the exponentials of the scores,
            sinks included. None if nobody wants it.

    Returns:
        `out`, `[token, query_head, head_dim]`, dtype of `q`; accumulated in float32. Rows of nobody are left alone.

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Source: rows of tokens times heads of a group as in "The Anatomy of a Triton Attention Kernel" (Ringlein et al.,
    2025).
    """
    shape = check_attention(q, k_cache, v_cache, block_tables, context_lens, options)
    out = check_outputs(q, out, lse)
    sequence_count = context_lens.shape[0]
    check_shape("query_starts", query_starts, (sequence_count + 1,))
    check_dtype("query_starts", query_starts, (torch.int32,))
    check_same_device(q=q, query_starts=query_starts)
    if q.shape[0] == 0 or sequence_count == 0:
        return out
    if workspace is not None and workspace.fits(q.shape[0], sequence_count):
        if shape != workspace.shape:
            message = f"q: heads as {workspace.shape} expected (the workspace's), found {shape}"
            raise ValueError(message)
        launch_split(q, k_cache, v_cache, block_tables, context_lens, query_starts, options, workspace, out, lse)
        return out
    config = prefill_config(q.device, shape, k_cache.dtype)
    grid = (q.shape[0] * shape.group // config.rows + sequence_count, shape.num_kv_heads)
    _prefill[grid](
        q, k_cache, v_cache, block_tables, context_lens, query_starts,
        q if options.sinks is None else options.sinks, out, out if lse is None else lse,
        sequence_count, options.score_factor, options.cap_log2, options.v_scale,
        q.stride(0), q.stride(1),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        v_cache.stride(0), v_cache.stride(1), v_cache.stride(2),
        block_tables.stride(0), out.stride(0), out.stride(1), 0 if lse is None else lse.stride(0),
        WINDOW=options.window, SOFT_CAP=options.soft_cap > 0, HAS_SINKS=options.sinks is not None,
        HAS_LSE=lse is not None, GROUP=shape.group, ROWS=config.rows, HEAD_DIM=shape.head_dim, DIMS=shape.dims,
        BLOCK_SIZE=shape.block_size, TILE=config.tile, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out
