"""Triton: everything that changes logits before a choice, in the one pass that a choice begins with.

A row's state is dense where a step may touch any token (what the sequence has, what a grammar allows) and sparse where
a request names tokens (bias, withheld ones). The changed logits are a copy, in float32 as on the host:
log-probabilities are of those that the model gave.
"""

import torch
import triton
import triton.language as tl

from kernels.checks import check_dtype, check_last_axis_dense, check_same_device, check_shape
from kernels.configs import lookup
from kernels.layout import ACTIVATION_DTYPES
from kernels.sampling.tensors import RUN, Changes, Penalties, Workspace

_ENTRIES = 256
"""Entries of a row that are looked at together."""
_PLACES = 256


@triton.jit
def _change(
    logits_ptr,
    changed_ptr,
    row_ptr,
    seen_ptr,
    entry_token_ptr,
    entry_bias_ptr,
    entry_count_ptr,
    mask_place_ptr,
    masks_ptr,
    temperature_ptr,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
    withheld_until_ptr,
    position_ptr,
    heads_ptr,
    masses_ptr,
    plain_heads_ptr,
    plain_masses_ptr,
    samples_ptr,
    stride_logits: tl.int64,
    stride_changed: tl.int64,
    stride_seen: tl.int64,
    stride_entries: tl.int64,
    stride_masks: tl.int64,
    vocabulary,
    run_count,
    RUNS: tl.constexpr,
    SIZE: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Grid (place, group of RUNS runs): the changed logits of each run, and what a scan leaves of both kinds."""
    place = tl.program_id(0).to(tl.int64)
    runs = tl.program_id(1) * RUNS + tl.arange(0, RUNS)
    tokens = runs[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    inside = tokens < vocabulary
    at = place * run_count + runs
    values = tl.load(logits_ptr + place * stride_logits + tokens, mask=inside, other=float("-inf")).to(tl.float32)
    heads = tl.max(values, 1)
    tl.store(plain_heads_ptr + at, heads, mask=runs < run_count)
    below = values - tl.where(heads == float("-inf"), 0.0, heads)[:, None]
    tl.store(plain_masses_ptr + at, tl.sum(tl.exp(below), 1), mask=runs < run_count)
    mask_place = tl.load(mask_place_ptr + place).to(tl.int64)
    if mask_place >= 0:
        words = tl.load(masks_ptr + mask_place * stride_masks + tokens // 32, mask=inside, other=0)
        values = tl.where((words >> (tokens % 32)) & 1 != 0, values, float("-inf"))
    given = tl.load(row_ptr + place)
    # Padding reads what belongs to row 0 and takes nothing of it.
    row = tl.maximum(given, 0).to(tl.int64)
    count = tl.where(given >= 0, tl.load(entry_count_ptr + row), 0)
    if count > 0:
        first = tl.program_id(1) * RUNS * SIZE
        start = tl.zeros([], tl.int32)
        stop = tl.zeros([], tl.int32)
        for group in range(0, count, ENTRIES):
            entries = group + tl.arange(0, ENTRIES)
            named = tl.load(entry_token_ptr + row * stride_entries + entries, mask=entries < count, other=2147483647)
            named = named & 2147483647
            start += tl.sum((named < first).to(tl.int32), 0)
            stop += tl.sum((named < first + RUNS * SIZE).to(tl.int32), 0)
        withholds = tl.load(position_ptr + place) < tl.load(withheld_until_ptr + place)
        for entry in range(start, stop):
            named = tl.load(entry_token_ptr + row * stride_entries + entry)
            bias = tl.load(entry_bias_ptr + row * stride_entries + entry)
            bias = tl.where((named < 0) & withholds, float("-inf"), bias)
            values = tl.where(tokens == (named & 2147483647), values + bias, values)
    repetition = tl.load(repetition_ptr + place)
    frequency = tl.load(frequency_ptr + place)
    presence = tl.load(presence_ptr + place)
    if (given >= 0) & ((repetition != 1.0) | (frequency != 0.0) | (presence != 0.0)):
        seen = tl.load(seen_ptr + row * stride_seen + tokens, mask=inside, other=0).to(tl.int32)
        # As the host divides and takes off: rounded after each operation, so that the bits are the same.
        repeated = tl.where(values > 0.0, tl.div_rn(values, tl.zeros_like(values) + repetition), values * repetition)
        values = tl.where(seen > 0, repeated, values)
        produced = seen >> 1
        values = tl.where(produced > 0, values - frequency * produced.to(tl.float32) - presence, values)
    tl.store(changed_ptr + place * stride_changed + tokens, values, mask=inside)
    heads = tl.max(values, 1)
    tl.store(heads_ptr + at, heads, mask=runs < run_count)
    sample = tl.sum(tl.where(tokens % SIZE == 0, values, 0.0), 1)
    tl.store(samples_ptr + at, sample, mask=runs < run_count)
    temperature = tl.load(temperature_ptr + place)
    inverse = 1.0 / tl.where(temperature == 0.0, 1.0, temperature)
    below = values - tl.where(heads == float("-inf"), 0.0, heads)[:, None]
    tl.store(masses_ptr + at, tl.sum(tl.exp(below * inverse), 1), mask=runs < run_count)


@triton.jit
def _note(
    seen_ptr,
    row_ptr,
    sampled_ptr,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
    stride_seen: tl.int64,
    count,
    PLACES: tl.constexpr,
):
    """Grid (group of places,): one more of the token that was sampled."""
    places = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    used = places < count
    rows = tl.load(row_ptr + places, mask=used, other=-1)
    tokens = tl.load(sampled_ptr + places, mask=used, other=-1)
    repetition = tl.load(repetition_ptr + places, mask=used, other=1.0)
    frequency = tl.load(frequency_ptr + places, mask=used, other=0.0)
    presence = tl.load(presence_ptr + places, mask=used, other=0.0)
    counts = (rows >= 0) & (tokens >= 0) & ((repetition != 1.0) | (frequency != 0.0) | (presence != 0.0))
    at = seen_ptr + rows.to(tl.int64) * stride_seen + tokens
    tl.store(at, tl.load(at, mask=counts, other=0) + 2, mask=counts)


def change_logits(
    logits: torch.Tensor,
    changes: Changes,
    penalties: Penalties,
    temperature: torch.Tensor,
    positions: torch.Tensor,
    workspace: Workspace,
) -> torch.Tensor:
    """Returns what a choice is made from, float32 `[place, vocabulary]`, in the workspace; writes its summaries, too.

    In this order: what a grammar does not allow becomes impossible; bias is added, or a withheld token becomes
    impossible; repetition divides positive logits, and multiplies others, of tokens that the row has seen; frequency is
    taken off for each time that the token was produced, presence if it was.

    Args:
        logits: `[place, vocabulary]`, dense in the last axis; float32, bfloat16 or float16. Not changed.
        changes: which state is whose.
        penalties: a place each.
        temperature: `[place]` float32: of the choice that follows.
        positions: `[place]` int32 or int64: index in its sequence of the token that is chosen.
        workspace: for at least as many places, with room for changed logits.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit.

    Complexity: the first pass over the logits. `choose.sample` is then told that its scan is done.
    """
    check_shape("logits", logits, (None, None))
    check_dtype("logits", logits, ACTIVATION_DTYPES)
    check_last_axis_dense("logits", logits)
    place_count, vocabulary = logits.shape
    run_count = triton.cdiv(vocabulary, RUN)
    check_shape("workspace.changed", workspace.changed, (None, vocabulary))
    check_shape("temperature", temperature, (place_count,))
    check_shape("positions", positions, (place_count,))
    changes.check(place_count, vocabulary)
    penalties.check(place_count)
    check_same_device(
        logits=logits, seen=changes.seen, temperature=temperature, positions=positions, workspace=workspace.changed
    )
    changed = workspace.changed[:place_count]
    if not place_count:
        return changed
    config = lookup("sampling", logits.device, vocabulary=vocabulary)
    # Nothing is contracted to a fused multiply-add: the host rounds after each operation.
    _change[(place_count, triton.cdiv(run_count, config["scan_runs"]))](
        logits, changed, changes.rows, changes.seen, changes.entry_tokens, changes.entry_bias, changes.entry_counts,
        changes.mask_places, changes.masks, temperature, penalties.repetition, penalties.frequency,
        penalties.presence, penalties.withheld_until, positions, workspace.heads, workspace.masses,
        workspace.plain_heads, workspace.plain_masses, workspace.samples, logits.stride(0), changed.stride(0),
        changes.seen.stride(0), changes.entry_tokens.stride(0), changes.masks.stride(0), vocabulary, run_count,
        RUNS=config["scan_runs"], SIZE=RUN, ENTRIES=_ENTRIES, num_warps=config["scan_warps"], enable_fp_fusion=False,
    )  # fmt: skip
    return changed


def note_tokens(seen: torch.Tensor, rows: torch.Tensor, sampled: torch.Tensor, penalties: Penalties) -> None:
    """Counts the tokens that were chosen, for the penalties of the next step. Writes `seen`.

    Args:
        seen: see Changes.
        rows: `[place]` int32, distinct but for -1, which counts nothing.
        sampled: `[place]` int32; -1: none.
        penalties: a place each; only rows that have any count.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit.
    """
    check_shape("seen", seen, (None, None))
    check_dtype("seen", seen, (torch.int16, torch.int32))
    check_last_axis_dense("seen", seen)
    count = rows.shape[0]
    for name, tensor in (("rows", rows), ("sampled", sampled)):
        check_shape(name, tensor, (count,))
        check_dtype(name, tensor, (torch.int32,))
        check_last_axis_dense(name, tensor)
    penalties.check(count)
    check_same_device(seen=seen, rows=rows, sampled=sampled, repetition=penalties.repetition)
    if count:
        _note[(triton.cdiv(count, _PLACES),)](
            seen, rows, sampled, penalties.repetition, penalties.frequency, penalties.presence, seen.stride(0), count,
            PLACES=_PLACES, num_warps=4,
        )  # fmt: skip
