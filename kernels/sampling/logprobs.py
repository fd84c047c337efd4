"""Triton: reports of log-probabilities, from what a scan of the model's logits left."""

import torch
import triton
import triton.language as tl

from kernels.checks import check_dtype, check_last_axis_dense, check_same_device, check_shape
from kernels.sampling.order import key_of, rank_of, token_of, value_of
from kernels.sampling.tensors import REPORT_WORDS, REPORTED, RUN

_RUNS = 8
"""Runs that are read together to count what is more likely than a token."""


@triton.jit
def _report(
    logits_ptr,
    token_ptr,
    count_ptr,
    heads_ptr,
    masses_ptr,
    report_ptr,
    stride_logits: tl.int64,
    stride_report: tl.int64,
    vocabulary,
    run_count,
    REPORTED: tl.constexpr,
    ALL_RUNS: tl.constexpr,
    RUNS: tl.constexpr,
    SIZE: tl.constexpr,
    LANE_BITS: tl.constexpr,
):
    """Grid (row,): a tournament of the runs' heads; whose head is taken puts up its next one."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + row)
    token = tl.load(token_ptr + row)
    if (count < 0) | (token < 0):
        return
    logits_ptr += row * stride_logits
    report_ptr += row * stride_report
    heads_ptr += row * run_count
    runs = tl.arange(0, ALL_RUNS)
    there = runs < run_count
    heads = tl.load(heads_ptr + runs, mask=there, other=float("-inf"))
    masses = tl.load(masses_ptr + row * run_count + runs, mask=there, other=0.0).to(tl.float64)
    largest = tl.max(heads, 0)
    # All are -inf, or one is not a number: a token may have been chosen all the same, if others were made impossible.
    total = tl.sum(masses * tl.exp(heads - largest).to(tl.float64), 0)
    bottom = largest.to(tl.float64) + tl.log(total)
    logit = tl.load(logits_ptr + token).to(tl.float32)
    above = tl.zeros([], tl.int32)
    for group in range(0, run_count, RUNS):
        some = group + tl.arange(0, RUNS)
        if tl.max(tl.load(heads_ptr + some, mask=some < run_count, other=float("-inf")), 0) > logit:
            tokens = group * SIZE + tl.arange(0, RUNS * SIZE)
            values = tl.load(logits_ptr + tokens, mask=tokens < vocabulary, other=float("-inf")).to(tl.float32)
            above += tl.sum((values > logit).to(tl.int32), 0)
    tl.store(report_ptr, above + 1)
    chosen = (logit.to(tl.float64) - bottom).to(tl.float32)
    tl.store(report_ptr + 1, chosen.to(tl.int32, bitcast=True))
    # Within a run, tokens from this rank upwards have been taken.
    taken = tl.full([ALL_RUNS], 9223372036854775807, tl.int64)
    keys = tl.where(heads == float("-inf"), 0, key_of(heads))
    for place in range(count):
        run = tl.argmax(keys, 0)
        lanes = tl.arange(0, SIZE)
        inside = run * SIZE + lanes < vocabulary
        logits = tl.load(logits_ptr + run * SIZE + lanes, mask=inside, other=float("-inf")).to(tl.float32)
        below = tl.max(tl.where(runs == run, taken, 0), 0)
        ranks = rank_of(logits, lanes, LANE_BITS)
        ranks = tl.where(inside & (logits > float("-inf")) & (ranks < below), ranks, 0)
        best = tl.max(ranks, 0)
        tl.store(report_ptr + 2 + place, tl.where(best > 0, run * SIZE + token_of(best, LANE_BITS), -1))
        value = tl.where(best > 0, (value_of(best >> LANE_BITS).to(tl.float64) - bottom).to(tl.float32), float("-inf"))
        tl.store(report_ptr + 2 + REPORTED + place, value.to(tl.int32, bitcast=True))
        following = tl.max(tl.where(ranks < best, ranks, 0), 0) >> LANE_BITS
        keys = tl.where(runs == run, following, keys)
        taken = tl.where(runs == run, best, taken)


def write_reports(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    counts: torch.Tensor,
    heads: torch.Tensor,
    masses: torch.Tensor,
    reports: torch.Tensor,
) -> None:
    """Reports a token of each row, and the most likely ones. Writes `reports`, of rows that report.

    Args:
        logits: `[row, vocabulary]`, as the model gave them.
        tokens: `[row]` int32; -1: the row is left out.
        counts: `[row]` int32: how many of the most likely tokens, 0 .. REPORTED; -1: the row is left out.
        heads: `[at least row, run]` float32: of a scan of the logits.
        masses: the same, without temperature.
        reports: `[row, REPORT_WORDS]` int32. Natural logarithms, of the logits as they are given; a token's rank is one
            more than how many logits are larger; equal ones are in the order of their tokens, and where the vocabulary
            has no more, the token is -1.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit.

    Complexity: reads one run for each token reported, and those runs again that hold a larger logit than the token's.
    """
    check_shape("logits", logits, (None, None))
    check_last_axis_dense("logits", logits)
    row_count, vocabulary = logits.shape
    for name, tensor in (("tokens", tokens), ("counts", counts)):
        check_shape(name, tensor, (row_count,))
        check_dtype(name, tensor, (torch.int32,))
        check_last_axis_dense(name, tensor)
    check_shape("reports", reports, (row_count, REPORT_WORDS))
    check_dtype("reports", reports, (torch.int32,))
    check_last_axis_dense("reports", reports)
    run_count = triton.cdiv(vocabulary, RUN)
    check_shape("heads", heads, (None, run_count))
    check_shape("masses", masses, heads.shape)
    check_same_device(logits=logits, tokens=tokens, counts=counts, heads=heads, masses=masses, reports=reports)
    if row_count:
        _report[(row_count,)](
            logits, tokens, counts, heads, masses, reports, logits.stride(0), reports.stride(0), vocabulary, run_count,
            REPORTED=REPORTED, ALL_RUNS=triton.next_power_of_2(run_count), RUNS=_RUNS, SIZE=RUN,
            LANE_BITS=RUN.bit_length() - 1, num_warps=4,
        )  # fmt: skip
