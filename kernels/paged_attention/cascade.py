"""Triton: decode for sequences of which some share a long prefix: the prefix is read once for a group, not once each.

`CascadeWorkspace.refresh` once a step, `paged_attention_cascade` once a layer. The result is that of
`paged_attention_decode` but for rounding. Sources: "Cascade Inference" (Ye et al., 2024), "Hydragen" (Juravsky et al.,
2024).
"""

import torch
import triton
import triton.language as tl

from kernels.paged_attention.configs import prefix_config
from kernels.paged_attention.decode import check_workspace, launch_decode
from kernels.paged_attention.kv_loop import attend_tiles
from kernels.paged_attention.merge import SharedParts, merge_parts
from kernels.paged_attention.options import AttentionOptions, check_attention, check_outputs
from kernels.paged_attention.prefix_groups import PrefixGroups
from kernels.paged_attention.workspace import DecodeWorkspace, Parts


@triton.jit(do_not_specialize=["item_count", "workers"])
def _attend_prefixes(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    len_ptr,
    members_ptr,
    item_ends_ptr,
    item_starts_ptr,
    item_firsts_ptr,
    item_counts_ptr,
    offsets_ptr,
    first_item_ptr,
    part_acc_ptr,
    part_max_ptr,
    part_sum_ptr,
    item_count,
    workers,
    score_factor,
    cap_log2,
    stride_q_token,
    stride_q_head,
    stride_k_block: tl.int64,
    stride_k_head: tl.int64,
    stride_k_slot,
    stride_v_block: tl.int64,
    stride_v_head: tl.int64,
    stride_v_slot,
    stride_table,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (worker, kv_head): the rows of an item, member by member, over a worker's share of tiles.

    Parts go to slot worker + item, as in decode.
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
    heads = kv_head * GROUP + rows % GROUP
    while unit < last:
        item_begin = tl.load(offsets_ptr + item)
        stop = tl.minimum(last, tl.load(offsets_ptr + item + 1))
        if stop > unit:
            first = tl.load(item_firsts_ptr + item)
            row_mask = rows // GROUP < tl.load(item_counts_ptr + item)
            mask = row_mask[:, None] & (dims < HEAD_DIM)[None, :]
            sequences = tl.load(members_ptr + first + rows // GROUP, mask=row_mask, other=0).to(tl.int64)
            row_floor = sequences
            if WINDOW > 0:
                row_floor = tl.load(len_ptr + sequences, mask=row_mask, other=0) - WINDOW
            start = tl.load(item_starts_ptr + item)
            first_tile = start // TILE + unit - item_begin
            q_ptrs = q_ptr + sequences[:, None] * stride_q_token + heads[:, None] * stride_q_head + dims[None, :]
            q = tl.load(q_ptrs, mask=mask, other=0.0)
            running_max, running_sum, acc = attend_tiles(
                q, tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32),
                tl.zeros([ROWS, DIMS], tl.float32),
                k_ptr + kv_head * stride_k_head, v_ptr + kv_head * stride_v_head,
                table_ptr + tl.load(members_ptr + first).to(tl.int64) * stride_table,
                first_tile, first_tile + stop - unit, start, tl.load(item_ends_ptr + item), row_floor, row_floor,
                score_factor, cap_log2, stride_k_block, stride_k_slot, stride_v_block, stride_v_slot,
                SOFT_CAP, True, WINDOW > 0, False, False, HEAD_DIM, DIMS, BLOCK_SIZE, TILE,
            )  # fmt: skip
            part = ((worker + item).to(tl.int64) * tl.num_programs(1) + kv_head) * (MEMBERS * GROUP) + rows
            tl.store(part_max_ptr + part, running_max, mask=row_mask)
            tl.store(part_sum_ptr + part, running_sum, mask=row_mask)
            tl.store(part_acc_ptr + part[:, None] * HEAD_DIM + dims[None, :], acc, mask=mask)
            unit = stop
        item += 1


class CascadeWorkspace:
    """Memory that cascade decode needs besides that of decode: allocated once, at addresses that stay."""

    def __init__(self, decode: DecodeWorkspace, kv_dtype: torch.dtype, device: torch.device, group_max: int) -> None:
        """Allocates.

        Args:
            decode: workspace for what the sequences do not share.
            kv_dtype: element type of the cache.
            device: where the work is done.
            group_max: most groups of a call.

        Raises:
            ValueError: `decode` shares out work invariantly, where company decides here; or a group has too many heads.
        """
        if decode.split_size:
            message = f"decode: a workspace without split_size expected, found split_size {decode.split_size}"
            raise ValueError(message)
        self.decode = decode
        self.config = prefix_config(device, decode.shape, kv_dtype)
        members = self.config.rows // decode.shape.group
        if members < 1:
            message = f"decode: at most {self.config.rows} query heads per kv head expected, found {decode.shape.group}"
            raise ValueError(message)
        self.groups = PrefixGroups(
            group_max, decode.sequence_max, members, decode.workers, self.config.tile, decode.partitions, device
        )
        part_max = decode.workers + self.groups.item_max
        self.parts = Parts(part_max, decode.shape.num_heads * members, decode.shape.head_dim, device)

    def refresh(self, context_lens: torch.Tensor) -> None:
        """Shares out the contexts of a step, as `groups` describes them. Does not wait for the device.

        Args:
            context_lens: `[sequence]` int32, cached tokens of each; 0 for padding, which is in no group.
        """
        self.groups.refresh(context_lens)
        self.decode.refresh(context_lens, self.groups.sequence_starts)


def paged_attention_cascade(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    options: AttentionOptions,
    workspace: CascadeWorkspace,
    *,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attends one query a sequence, the prefixes that `workspace.groups` names being read once for a group.

    Arguments, result and errors are those of `paged_attention_decode`; the members of a group have the same blocks in
    front of their tables, and the first member's are read for all.

    Complexity: reads each key and value of a prefix once for every `members_per_item` members, all others once.
    """
    shape = check_attention(q, k_cache, v_cache, block_tables, context_lens, options)
    out = check_outputs(q, out, lse)
    check_workspace(q, context_lens, shape, workspace.decode)
    if q.shape[0] == 0:
        return out
    groups, parts, config = workspace.groups, workspace.parts, workspace.config
    partition = groups.partitions[workspace.decode.partition(options.window).window]
    _attend_prefixes[(workspace.decode.workers, shape.num_kv_heads)](
        q, k_cache, v_cache, block_tables, context_lens, groups.columns.members, groups.item_ends,
        groups.item_starts[options.window], groups.item_firsts, groups.item_counts, partition.offsets,
        partition.first_items, parts.acc, parts.maxima, parts.sums, groups.item_max, workspace.decode.workers,
        options.score_factor, options.cap_log2, q.stride(0), q.stride(1),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        v_cache.stride(0), v_cache.stride(1), v_cache.stride(2), block_tables.stride(0),
        WINDOW=options.window, SOFT_CAP=options.soft_cap > 0, GROUP=shape.group, MEMBERS=groups.members_per_item,
        ROWS=config.rows, HEAD_DIM=shape.head_dim, DIMS=shape.dims, BLOCK_SIZE=shape.block_size, TILE=config.tile,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    launch_decode(
        q, k_cache, v_cache, block_tables, context_lens, groups.sequence_starts, options, workspace.decode, out, lse
    )
    shared = SharedParts(
        parts, partition.offsets, groups.sequence_items, groups.sequence_places, groups.item_max,
        groups.members_per_item,
    )  # fmt: skip
    merge_parts(workspace.decode, q.shape[0], options, out, lse, shared)
    return out
