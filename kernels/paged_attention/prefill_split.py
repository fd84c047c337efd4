"""Triton: few queries over long contexts. Row blocks' contexts are shared out over a fixed grid, then the parts merged.

A grid of row blocks leaves most of a device idle when there are few of them: a turn of 16 tokens on 32,000 cached ones
is one row block a kv head. Here a row block is an item of `partition.py`, as a sequence is in decode: every worker
takes the same number of tiles, whoever's they are. `PrefillWorkspace.refresh` once a step, `launch_split` once a layer.
"""

import torch
import triton
import triton.language as tl

from kernels.checks import check_shape
from kernels.paged_attention.configs import row_worker_count, split_config
from kernels.paged_attention.kv_loop import attend_tiles, store_rows
from kernels.paged_attention.merge import fold_parts, item_slots
from kernels.paged_attention.options import AttentionOptions, HeadShape
from kernels.paged_attention.partition import Partition
from kernels.paged_attention.row_blocks import find_sequence
from kernels.paged_attention.workspace import Parts


@triton.jit(do_not_specialize=["sequence_count"], do_not_specialize_on_alignment=["start_ptr", "len_ptr"])
def _cut_rows(
    start_ptr,
    len_ptr,
    item_sequences_ptr,
    item_rows_ptr,
    item_starts_ptr,
    item_ends_ptr,
    sequence_count,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid (item,): whose row block it is, where it begins, and what it sees; nothing for a spare one."""
    item = tl.program_id(0)
    origin = tl.load(start_ptr)
    sequence, first_item = find_sequence(start_ptr, sequence_count, item, origin, GROUP, ROWS)
    query_count = tl.load(start_ptr + sequence + 1) - tl.load(start_ptr + sequence)
    first_row = (item - first_item) * ROWS
    length = tl.load(len_ptr + sequence)
    first_position = length - query_count
    used = first_row < query_count * GROUP
    end = tl.minimum(first_position + (first_row + ROWS - 1) // GROUP, length - 1) + 1
    start = 0
    if WINDOW > 0:
        start = tl.maximum(first_position + first_row // GROUP - WINDOW + 1, 0)
    tl.store(item_sequences_ptr + item, sequence)
    tl.store(item_rows_ptr + item, first_row)
    tl.store(item_starts_ptr + item, tl.where(used, start, 0))
    tl.store(item_ends_ptr + item, tl.where(used, end, 0))


@triton.jit(
    do_not_specialize=["item_count", "workers"], do_not_specialize_on_alignment=["start_ptr", "len_ptr", "table_ptr"]
)
def _prefill_parts(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    len_ptr,
    start_ptr,
    item_sequences_ptr,
    item_rows_ptr,
    item_starts_ptr,
    item_ends_ptr,
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
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (worker, kv_head): the rows of an item over a worker's share of tiles.

    What is an item's only part goes to the output at once, other parts to slot worker + item, as in decode.
    """
    worker = tl.program_id(0)
    kv_head = tl.program_id(1)
    share = tl.cdiv(tl.load(offsets_ptr + item_count), workers)
    unit = worker * share
    last = tl.minimum(unit + share, tl.load(offsets_ptr + item_count))
    item = tl.load(first_item_ptr + worker)
    row_offsets = tl.arange(0, ROWS)
    dims = tl.arange(0, DIMS)
    while unit < last:
        item_begin = tl.load(offsets_ptr + item)
        item_end = tl.load(offsets_ptr + item + 1)
        stop = tl.minimum(last, item_end)
        if stop > unit:
            sequence = tl.load(item_sequences_ptr + item)
            query_start = tl.load(start_ptr + sequence)
            query_count = tl.load(start_ptr + sequence + 1) - query_start
            first_row = tl.load(item_rows_ptr + item)
            start = tl.load(item_starts_ptr + item)
            end = tl.load(item_ends_ptr + item)
            tokens = (first_row + row_offsets) // GROUP
            heads = kv_head * GROUP + (first_row + row_offsets) % GROUP
            row_mask = tokens < query_count
            mask = row_mask[:, None] & (dims < HEAD_DIM)[None, :]
            token_rows = (query_start + tokens).to(tl.int64)
            q_ptrs = q_ptr + token_rows[:, None] * stride_q_token + heads[:, None] * stride_q_head + dims[None, :]
            q = tl.load(q_ptrs, mask=mask, other=0.0)
            first_position = tl.load(len_ptr + sequence) - query_count
            row_ceiling = first_position + tokens
            row_floor = row_ceiling - WINDOW + 1
            first_tile = start // TILE + unit - item_begin
            k_head_ptr = k_ptr + kv_head * stride_k_head
            v_head_ptr = v_ptr + kv_head * stride_v_head
            sequence_table_ptr = table_ptr + sequence.to(tl.int64) * stride_table
            # All tiles are masked: what the few that need none would save is nothing beside their loads.
            state_max, state_sum, acc = attend_tiles(
                q, tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32),
                tl.zeros([ROWS, DIMS], tl.float32), k_head_ptr, v_head_ptr, sequence_table_ptr,
                first_tile, first_tile + stop - unit, 0, end, row_floor, row_ceiling, score_factor, cap_log2,
                stride_k_block, stride_k_slot, stride_v_block, stride_v_slot,
                SOFT_CAP, True, WINDOW > 0, True, False, HEAD_DIM, DIMS, BLOCK_SIZE, TILE,
            )  # fmt: skip
            if (unit == item_begin) & (stop == item_end):
                store_rows(
                    state_max, state_sum, acc, v_scale, row_mask, sinks_ptr + heads,
                    out_ptr + token_rows * stride_out_token + heads * stride_out_head,
                    lse_ptr + token_rows * stride_lse_token + heads, HAS_SINKS, HAS_LSE, HEAD_DIM, DIMS,
                )  # fmt: skip
            else:
                part = ((worker + item).to(tl.int64) * tl.num_programs(1) + kv_head) * ROWS + row_offsets
                tl.store(part_max_ptr + part, state_max, mask=row_mask)
                tl.store(part_sum_ptr + part, state_sum, mask=row_mask)
                tl.store(part_acc_ptr + part[:, None] * HEAD_DIM + dims[None, :], acc, mask=mask)
            unit = stop
        if unit >= item_end:
            item += 1


@triton.jit(do_not_specialize=["item_count", "workers"], do_not_specialize_on_alignment=["start_ptr"])
def _merge_rows(
    part_acc_ptr,
    part_max_ptr,
    part_sum_ptr,
    offsets_ptr,
    start_ptr,
    item_sequences_ptr,
    item_rows_ptr,
    sinks_ptr,
    out_ptr,
    lse_ptr,
    item_count,
    workers,
    v_scale,
    stride_out_token,
    stride_out_head,
    stride_lse_token,
    HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Grid (item, row of its block, kv_head)."""
    item = tl.program_id(0)
    row = tl.program_id(1)
    kv_head = tl.program_id(2)
    first, count = item_slots(offsets_ptr, item, item_count, workers, False)
    if count <= 1:
        # What has one part only is in the output already.
        return
    sequence = tl.load(item_sequences_ptr + item)
    query_start = tl.load(start_ptr + sequence)
    place = tl.load(item_rows_ptr + item) + row
    if place >= (tl.load(start_ptr + sequence + 1) - query_start) * GROUP:
        return
    running_max, running_sum, acc = fold_parts(
        tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32), tl.zeros([1, DIMS], tl.float32),
        part_acc_ptr, part_max_ptr, part_sum_ptr, first, count, kv_head * ROWS + row,
        NUM_KV_HEADS * ROWS, HEAD_DIM, DIMS, PARTS,
    )  # fmt: skip
    one = tl.arange(0, 1)
    token = (query_start + place // GROUP).to(tl.int64)
    head = kv_head * GROUP + place % GROUP
    store_rows(
        running_max, running_sum, acc, v_scale, one == 0, sinks_ptr + head + one,
        out_ptr + token * stride_out_token + head * stride_out_head + one,
        lse_ptr + token * stride_lse_token + head + one, HAS_SINKS, HAS_LSE, HEAD_DIM, DIMS,
    )  # fmt: skip


class PrefillWorkspace:
    """Scratch and partitions for prefill with few row blocks. All launches that use it must be on one stream."""

    def __init__(
        self,
        shape: HeadShape,
        kv_dtype: torch.dtype,
        device: torch.device,
        *,
        windows: tuple[int, ...] = (0,),
        workers: int = 0,
        item_max: int = 0,
    ) -> None:
        """Allocates.

        Args:
            shape: heads of the queries and the cache.
            kv_dtype: element type of the cache.
            device: where the work is done.
            windows: the windows of the model's layers (0: none).
            workers: programs per kv head; 0 for what fills the device.
            item_max: most row blocks that are shared out; more fill the device by themselves. 0 for that number.
        """
        self.shape = shape
        self.config = split_config(device, shape, kv_dtype)
        self.workers = workers or row_worker_count(device, shape.num_kv_heads)
        # Prefill without a workspace has twice as many rows in a block: with more than this its grid fills the device.
        self.item_max = item_max or 2 * self.workers

        def integers() -> torch.Tensor:
            return torch.zeros(self.item_max, dtype=torch.int32, device=device)

        self.item_sequences, self.item_rows, self.item_ends = integers(), integers(), integers()
        self.item_starts = {window: integers() for window in windows}
        self.partitions = {
            window: Partition.allocate(self.item_max, self.workers, self.config.tile, 1, 0, device)
            for window in windows
        }
        part_max = self.workers + self.item_max
        self.parts = Parts(part_max, shape.num_kv_heads * self.config.rows, shape.head_dim, device)

    def item_count(self, token_count: int, sequence_count: int) -> int:
        """Returns how many row blocks there may be, as far as shapes tell."""
        return token_count * self.shape.group // self.config.rows + sequence_count

    def fits(self, token_count: int, sequence_count: int) -> bool:
        """Whether there are few enough row blocks to share them out."""
        return 0 < self.item_count(token_count, sequence_count) <= self.item_max

    def refresh(self, context_lens: torch.Tensor, query_starts: torch.Tensor, token_count: int) -> None:
        """Shares out the contexts of a step; once a step, before its first layer. Does not wait for the device.

        Nothing is done, and `paged_attention_prefill` does without, if the row blocks fill the device by themselves.

        Args:
            context_lens: `[sequence]` int32, cached tokens of each, its new ones included.
            query_starts: `[sequence + 1]` int32, where each sequence's queries begin.
            token_count: rows of queries.

        Raises:
            ValueError: the shapes do not fit each other.
        """
        sequence_count = context_lens.shape[0]
        check_shape("query_starts", query_starts, (sequence_count + 1,))
        if not self.fits(token_count, sequence_count):
            return
        count = self.item_count(token_count, sequence_count)
        for window, item_starts in self.item_starts.items():
            _cut_rows[(count,)](
                query_starts, context_lens, self.item_sequences, self.item_rows, item_starts, self.item_ends,
                sequence_count, WINDOW=window, GROUP=self.shape.group, ROWS=self.config.rows, num_warps=1,
            )  # fmt: skip
            self.partitions[window].refresh(self.item_ends[:count], item_starts)


_PARTS = 16
"""Parts loaded in one go."""


def launch_split(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_starts: torch.Tensor,
    options: AttentionOptions,
    workspace: PrefillWorkspace,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Computes and merges the parts of every row block; the arguments are checked by `paged_attention_prefill`.

    Raises:
        ValueError: the workspace is for another shape or has no partition for the window.
    """
    shape, config, parts = workspace.shape, workspace.config, workspace.parts
    partition = workspace.partitions.get(options.window)
    if partition is None:
        message = f"window: one of {sorted(workspace.partitions)} expected (the workspace's), found {options.window}"
        raise ValueError(message)
    count = workspace.item_count(q.shape[0], context_lens.shape[0])
    sinks, sums = q if options.sinks is None else options.sinks, out if lse is None else lse
    stride_lse = 0 if lse is None else lse.stride(0)
    common = {
        "HAS_SINKS": options.sinks is not None, "HAS_LSE": lse is not None, "GROUP": shape.group, "ROWS": config.rows,
        "HEAD_DIM": shape.head_dim, "DIMS": shape.dims,
    }  # fmt: skip
    _prefill_parts[(workspace.workers, shape.num_kv_heads)](
        q, k_cache, v_cache, block_tables, context_lens, query_starts, workspace.item_sequences, workspace.item_rows,
        workspace.item_starts[options.window], workspace.item_ends, partition.offsets, partition.first_items,
        sinks, out, sums, parts.acc, parts.maxima, parts.sums, count, workspace.workers,
        options.score_factor, options.cap_log2, options.v_scale, q.stride(0), q.stride(1),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        v_cache.stride(0), v_cache.stride(1), v_cache.stride(2),
        block_tables.stride(0), out.stride(0), out.stride(1), stride_lse,
        WINDOW=options.window, SOFT_CAP=options.soft_cap > 0, BLOCK_SIZE=shape.block_size, TILE=config.tile,
        num_warps=config.num_warps, num_stages=config.num_stages, **common,
    )  # fmt: skip
    _merge_rows[(count, config.rows, shape.num_kv_heads)](
        parts.acc, parts.maxima, parts.sums, partition.offsets, query_starts, workspace.item_sequences,
        workspace.item_rows, sinks, out, sums, count, workspace.workers, options.v_scale,
        out.stride(0), out.stride(1), stride_lse, NUM_KV_HEADS=shape.num_kv_heads, PARTS=_PARTS, num_warps=2, **common,
    )  # fmt: skip
