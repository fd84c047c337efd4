"""Triton: one query a sequence; contexts are shared out over a fixed grid, then the parts are merged.

`DecodeWorkspace.refresh` once a step, `paged_attention_decode` once a layer.
"""

import torch
import triton
import triton.language as tl

from kernels.paged_attention.kv_loop import attend_tiles, store_rows
from kernels.paged_attention.merge import merge_parts
from kernels.paged_attention.options import AttentionOptions, HeadShape, check_attention, check_outputs
from kernels.paged_attention.workspace import DecodeWorkspace


@triton.jit(do_not_specialize=["item_count", "workers"])
def _decode(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    end_ptr,
    start_ptr,
    offsets_ptr,
    first_item_ptr,
    sinks_ptr,
    out_ptr,
    lse_ptr,
    part_acc_ptr,
    part_max_ptr,
    part_sum_ptr,
    item_count,
    workers,
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
    HAS_STARTS: tl.constexpr,
    FIXED: tl.constexpr,
    PAIRED: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Grid (worker, kv_head): all query heads of one kv head over one worker's share of units.

    What is a sequence's only part goes to the output at once; other parts go to slot worker + sequence (no other pair
    has that sum, as both only rise along the row of units), or, with FIXED splits, to the slot of the split.
    """
    worker = tl.program_id(0)
    kv_head = tl.program_id(1)
    total = tl.load(offsets_ptr + item_count)
    share = tl.cdiv(total, workers)
    unit = worker * share
    last = tl.minimum(unit + share, total)
    item = tl.load(first_item_ptr + worker)
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIMS)
    row_mask = rows < GROUP
    mask = row_mask[:, None] & (dims < HEAD_DIM)[None, :]
    heads = kv_head * GROUP + rows
    k_head_ptr = k_ptr + kv_head * stride_k_head
    v_head_ptr = v_ptr + kv_head * stride_v_head
    while unit < last:
        item_begin = tl.load(offsets_ptr + item)
        item_end = tl.load(offsets_ptr + item + 1)
        stop = tl.minimum(last, item_end)
        if FIXED:
            stop = tl.minimum(stop, unit + 1)
        if stop > unit:
            sequence = item.to(tl.int64)
            end = tl.load(end_ptr + item)
            start = 0
            whole = (unit == item_begin) & (stop == item_end)
            if WINDOW > 0:
                start = tl.maximum(end - WINDOW, 0)
            if HAS_STARTS:
                skipped = tl.load(start_ptr + item)
                start = tl.maximum(start, skipped)
                whole = whole & (skipped == 0)
            first_tile = start // TILE + (unit - item_begin) * UNIT
            last_tile = tl.minimum(first_tile + (stop - unit) * UNIT, tl.cdiv(end, TILE))
            q_ptrs = q_ptr + sequence * stride_q_token + heads[:, None] * stride_q_head + dims[None, :]
            q = tl.load(q_ptrs, mask=mask, other=0.0)
            running_max, running_sum, acc = attend_tiles(
                q, tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32),
                tl.zeros([ROWS, DIMS], tl.float32),
                k_head_ptr, v_head_ptr, table_ptr + sequence * stride_table, first_tile, last_tile, start, end,
                rows, rows, score_factor, cap_log2,
                stride_k_block, stride_k_slot, stride_v_block, stride_v_slot,
                SOFT_CAP, True, False, False, PAIRED, HEAD_DIM, DIMS, BLOCK_SIZE, TILE,
            )  # fmt: skip
            if whole:
                store_rows(
                    running_max, running_sum, acc, v_scale, row_mask, sinks_ptr + heads,
                    out_ptr + sequence * stride_out_token + heads * stride_out_head,
                    lse_ptr + sequence * stride_lse_token + heads, HAS_SINKS, HAS_LSE, HEAD_DIM, DIMS,
                )  # fmt: skip
            else:
                slot = worker + item
                if FIXED:
                    slot = unit
                part = slot.to(tl.int64) * NUM_HEADS + heads
                tl.store(part_max_ptr + part, running_max, mask=row_mask)
                tl.store(part_sum_ptr + part, running_sum, mask=row_mask)
                tl.store(part_acc_ptr + part[:, None] * HEAD_DIM + dims[None, :], acc, mask=mask)
            unit = stop
        if unit >= item_end:
            item += 1


def paged_attention_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    options: AttentionOptions,
    workspace: DecodeWorkspace,
    *,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attends one query a sequence to its cached keys and values.

    Nothing depends on values on the host: the same launches serve any lengths and tables, so they can be captured in a
    CUDA graph (with `out` given, nothing is allocated).

    Args:
        q: `[sequence, query_head, head_dim]`, dense in the last axis.
        k_cache: `[block, kv_head, block_size, head_dim]`, dtype of `q` or float8_e4m3fn, dense in the last axis.
        v_cache: like `k_cache`.
        block_tables: `[sequence, block_max]` int32; entries past a sequence's last block are unread.
        context_lens: `[sequence]` int32, cached tokens, the query's own included; 0 for padding. The same values as in
            the last `workspace.refresh`.
        options: scale, window and the like.
        workspace: scratch; written.
        out: where the result goes; None for a new tensor.
        lse: `[sequence, query_head]` float32, written: natural logarithm of the sum of the exponentials of the scores,
            sinks included; -inf for a row that sees nothing. None if nobody wants it.

    Returns:
        `out`, `[sequence, query_head, head_dim]`, dtype of `q`; accumulated in float32. Rows of length 0 are zero.

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Complexity: reads each visible key and value once, plus a table entry per block.
    Source: splitting and merging after Flash-Decoding (Dao et al., 2023); the partition is described in `partition.py`.
    """
    shape = check_attention(q, k_cache, v_cache, block_tables, context_lens, options)
    out = check_outputs(q, out, lse)
    check_workspace(q, context_lens, shape, workspace)
    if q.shape[0] == 0:
        return out
    launch_decode(q, k_cache, v_cache, block_tables, context_lens, None, options, workspace, out, lse)
    merge_parts(workspace, q.shape[0], options, out, lse)
    return out


def check_workspace(q: torch.Tensor, context_lens: torch.Tensor, shape: HeadShape, workspace: DecodeWorkspace) -> None:
    """Checks that `workspace` is for heads of `shape` and for as many sequences as there are.

    Raises:
        ValueError: it is not, or there is not one query a sequence.
    """
    if shape != workspace.shape or q.shape[0] != context_lens.shape[0] or q.shape[0] > workspace.sequence_max:
        message = (
            f"q: {context_lens.shape[0]} sequences (at most {workspace.sequence_max}) of heads as {workspace.shape} "
            f"expected, found {q.shape[0]} of {shape}"
        )
        raise ValueError(message)


def launch_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    starts: torch.Tensor | None,
    options: AttentionOptions,
    workspace: DecodeWorkspace,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Computes the parts of every sequence.

    `starts`, `[sequence]` int32, are positions that another kernel attends to; None for none. The other arguments are
    those of `paged_attention_decode`, already checked.
    """
    shape, config, parts = workspace.shape, workspace.config, workspace.parts
    partition = workspace.partition(options.window)
    _decode[(workspace.workers, shape.num_kv_heads)](
        q, k_cache, v_cache, block_tables, context_lens, context_lens if starts is None else starts,
        partition.offsets, partition.first_items, q if options.sinks is None else options.sinks,
        out, out if lse is None else lse, parts.acc, parts.maxima, parts.sums,
        q.shape[0], workspace.workers, options.score_factor, options.cap_log2, options.v_scale,
        q.stride(0), q.stride(1),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        v_cache.stride(0), v_cache.stride(1), v_cache.stride(2),
        block_tables.stride(0), out.stride(0), out.stride(1), 0 if lse is None else lse.stride(0),
        WINDOW=options.window, SOFT_CAP=options.soft_cap > 0, HAS_SINKS=options.sinks is not None,
        HAS_LSE=lse is not None, HAS_STARTS=starts is not None, FIXED=workspace.split_size > 0,
        PAIRED=v_cache.element_size() == 1, NUM_HEADS=shape.num_heads, GROUP=shape.group,
        ROWS=max(16, triton.next_power_of_2(shape.group)), HEAD_DIM=shape.head_dim, DIMS=shape.dims,
        BLOCK_SIZE=shape.block_size, TILE=config.tile, UNIT=partition.unit,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
