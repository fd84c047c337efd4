"""Triton: merges unfinished results of attention over parts of a context.

With m the largest score of a part, s its sum of weights relative to m, and a its weighted sum of values, two parts give

    m = max(m1, m2),  s = s1 2^(m1 - m) + s2 2^(m2 - m),  a = a1 2^(m1 - m) + a2 2^(m2 - m)

and the output is a / s. Source: Flash-Decoding (Dao et al., 2023); the same for finished results, with logarithms of
sums in place of m and s, is in "Cascade Inference" (Ye et al., 2024).
"""

import dataclasses

import torch
import triton
import triton.language as tl

from kernels.paged_attention.kv_loop import store_rows
from kernels.paged_attention.options import AttentionOptions
from kernels.paged_attention.workspace import DecodeWorkspace, Parts

_PARTS = 16
"""Parts loaded in one go."""


@triton.jit
def item_slots(offsets_ptr, item, item_count, workers, FIXED: tl.constexpr):
    """Returns the first slot of an item's parts and their number; the slots follow one another."""
    begin = tl.load(offsets_ptr + item)
    end = tl.load(offsets_ptr + item + 1)
    if FIXED:
        first = begin
        count = end - begin
    else:
        share = tl.maximum(tl.cdiv(tl.load(offsets_ptr + item_count), workers), 1)
        first = begin // share + item
        count = tl.where(end > begin, (end - 1) // share - begin // share + 1, 0)
    return first, count


@triton.jit
def fold_parts(
    running_max,
    running_sum,
    acc,
    part_acc_ptr,
    part_max_ptr,
    part_sum_ptr,
    first,
    count,
    row,
    ROW_COUNT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Adds the parts of one row, in order, PARTS at a time: so that their loads do not wait for one another.

    The state is that of one row: running_max `[1]`, running_sum `[1]`, acc `[1, DIMS]`.
    """
    dims = tl.arange(0, DIMS)
    lanes = tl.arange(0, PARTS)
    for chunk in range(0, count, PARTS):
        inside = chunk + lanes < count
        part = (first + chunk + lanes).to(tl.int64) * ROW_COUNT + row
        maxima = tl.load(part_max_ptr + part, mask=inside, other=float("-inf"))
        sums = tl.load(part_sum_ptr + part, mask=inside, other=0.0)
        values = tl.load(
            part_acc_ptr + part[:, None] * HEAD_DIM + dims[None, :],
            mask=inside[:, None] & (dims < HEAD_DIM)[None, :],
            other=0.0,
        )
        new_max = tl.maximum(running_max, tl.max(maxima, 0))
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(maxima - safe_max)
        rescale = tl.exp2(running_max - safe_max)
        running_sum = running_sum * rescale + tl.sum(sums * weights, 0)
        acc = acc * rescale[:, None] + tl.sum(values * weights[:, None], 0)[None, :]
        running_max = new_max
    return running_max, running_sum, acc


@triton.jit(do_not_specialize=["item_count", "workers", "shared_count"])
def _merge_parts(
    part_acc_ptr,
    part_max_ptr,
    part_sum_ptr,
    offsets_ptr,
    sinks_ptr,
    out_ptr,
    lse_ptr,
    shared_acc_ptr,
    shared_max_ptr,
    shared_sum_ptr,
    shared_offsets_ptr,
    shared_item_ptr,
    shared_place_ptr,
    item_count,
    workers,
    shared_count,
    v_scale,
    stride_out_token,
    stride_out_head,
    stride_lse_token,
    FIXED: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Grid (sequence, query_head). With SHARED, parts over a prefix shared with other sequences come first."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    first, count = item_slots(offsets_ptr, sequence, item_count, workers, FIXED)
    shared_item = -1
    if SHARED:
        shared_item = tl.load(shared_item_ptr + sequence)
    if (count == 1) & (shared_item < 0):
        # What has one part only is in the output already.
        return
    running_max = tl.full([1], float("-inf"), tl.float32)
    running_sum = tl.zeros([1], tl.float32)
    acc = tl.zeros([1, DIMS], tl.float32)
    if SHARED:  # noqa: SIM102 - one is decided by the compiler, the other by the device
        if shared_item >= 0:
            shared_first, shared_parts = item_slots(shared_offsets_ptr, shared_item, shared_count, workers, False)
            row = (head // GROUP) * (MEMBERS * GROUP) + tl.load(shared_place_ptr + sequence) * GROUP + head % GROUP
            running_max, running_sum, acc = fold_parts(
                running_max, running_sum, acc, shared_acc_ptr, shared_max_ptr, shared_sum_ptr, shared_first,
                shared_parts, row, NUM_HEADS * MEMBERS, HEAD_DIM, DIMS, PARTS,
            )  # fmt: skip
    running_max, running_sum, acc = fold_parts(
        running_max, running_sum, acc, part_acc_ptr, part_max_ptr, part_sum_ptr, first, count, head,
        NUM_HEADS, HEAD_DIM, DIMS, PARTS,
    )  # fmt: skip
    one = tl.arange(0, 1)
    token = sequence.to(tl.int64)
    store_rows(
        running_max, running_sum, acc, v_scale, one == 0, sinks_ptr + head + one,
        out_ptr + token * stride_out_token + head * stride_out_head + one,
        lse_ptr + token * stride_lse_token + head + one, HAS_SINKS, HAS_LSE, HEAD_DIM, DIMS,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class SharedParts:
    """Parts over prefixes, each of several sequences at once."""

    parts: Parts
    offsets: torch.Tensor
    """`[item + 1]` int32, of the partition of the prefixes."""
    sequence_items: torch.Tensor
    """`[sequence]` int32: the item that a sequence is in; -1 for none."""
    sequence_places: torch.Tensor
    """`[sequence]` int32: its place in the item."""
    item_count: int
    """Items, unused ones included."""
    members: int
    """Places of an item."""


def merge_parts(
    workspace: DecodeWorkspace,
    sequence_count: int,
    options: AttentionOptions,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    shared: SharedParts | None = None,
) -> None:
    """Merges the parts of every sequence, as `decode.launch_decode` left them in `workspace`.

    Args:
        workspace: what the parts are in.
        sequence_count: sequences of the call.
        options: as for the parts.
        out: `[sequence, query_head, head_dim]`; rows of sequences with one part are left alone, others written.
        lse: `[sequence, query_head]` float32, written likewise; None if nobody wants it.
        shared: parts over prefixes that some of the sequences share; None for none.
    """
    shape, parts = workspace.shape, workspace.parts
    offsets = workspace.partition(options.window).offsets
    prefixes = shared or SharedParts(parts, offsets, offsets, offsets, 0, 1)
    _merge_parts[(sequence_count, shape.num_heads)](
        parts.acc, parts.maxima, parts.sums, offsets, out if options.sinks is None else options.sinks,
        out, out if lse is None else lse, prefixes.parts.acc, prefixes.parts.maxima, prefixes.parts.sums,
        prefixes.offsets, prefixes.sequence_items, prefixes.sequence_places,
        sequence_count, workspace.workers, prefixes.item_count, options.v_scale,
        out.stride(0), out.stride(1), 0 if lse is None else lse.stride(0),
        FIXED=workspace.split_size > 0, SHARED=shared is not None, HAS_SINKS=options.sinks is not None,
        HAS_LSE=lse is not None, NUM_HEADS=shape.num_heads, GROUP=shape.group, MEMBERS=prefixes.members,
        HEAD_DIM=shape.head_dim, DIMS=shape.dims, PARTS=_PARTS, num_warps=4,
    )  # fmt: skip
