"""Triton: log-probabilities of the chosen and of the most likely tokens, from what the scan left."""

import torch
import triton
import triton.language as tl

from kernels.checks import check_dtype, check_same_device, check_shape
from kernels.sampling.order import key_of, rank_of, token_of, value_of
from kernels.sampling.tensors import RUN, LogProbabilities, Workspace


@triton.jit
def _log_probabilities(
    logits_ptr,
    out_ptr,
    heads_ptr,
    plain_ptr,
    chosen_ptr,
    top_tokens_ptr,
    top_ptr,
    stride_logits: tl.int64,
    vocabulary,
    run_count,
    TOP: tl.constexpr,
    ALL_RUNS: tl.constexpr,
    SIZE: tl.constexpr,
    LANE_BITS: tl.constexpr,
):
    """Grid (row,): a tournament of the runs' heads; whose head is taken puts up its next one."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_logits
    runs = tl.arange(0, ALL_RUNS)
    there = runs < run_count
    heads = tl.load(heads_ptr + row * run_count + runs, mask=there, other=float("-inf"))
    masses = tl.load(plain_ptr + row * run_count + runs, mask=there, other=0.0).to(tl.float64)
    largest = tl.max(heads, 0)
    total = tl.sum(masses * tl.exp(heads - largest).to(tl.float64), 0)
    bottom = largest.to(tl.float64) + tl.log(total)
    token = tl.load(out_ptr + row)
    chosen = tl.load(logits_ptr + tl.maximum(token, 0)).to(tl.float64) - bottom
    tl.store(chosen_ptr + row, tl.where(token >= 0, chosen, float("nan")).to(tl.float32))
    # Within a run, tokens from this rank upwards have been taken.
    taken = tl.full([ALL_RUNS], 9223372036854775807, tl.int64)
    keys = tl.where(heads == float("-inf"), 0, key_of(heads))
    for place in range(TOP):
        run = tl.argmax(keys, 0)
        lanes = tl.arange(0, SIZE)
        inside = run * SIZE + lanes < vocabulary
        logits = tl.load(logits_ptr + run * SIZE + lanes, mask=inside, other=float("-inf")).to(tl.float32)
        below = tl.max(tl.where(runs == run, taken, 0), 0)
        ranks = rank_of(logits, lanes, LANE_BITS)
        ranks = tl.where(inside & (logits > float("-inf")) & (ranks < below), ranks, 0)
        best = tl.max(ranks, 0)
        found = (best > 0) & (token >= 0)
        at = row * TOP + place
        tl.store(top_tokens_ptr + at, tl.where(found, run * SIZE + token_of(best, LANE_BITS), -1))
        value = value_of(best >> LANE_BITS).to(tl.float64) - bottom
        tl.store(top_ptr + at, tl.where(found, value, float("-inf")).to(tl.float32))
        following = tl.max(tl.where(ranks < best, ranks, 0), 0) >> LANE_BITS
        keys = tl.where(runs == run, following, keys)
        taken = tl.where(runs == run, best, taken)


def write_log_probabilities(
    logits: torch.Tensor, tokens: torch.Tensor, workspace: Workspace, log_probabilities: LogProbabilities
) -> None:
    """Computes log-probabilities after a choice. Writes `log_probabilities`.

    Args:
        logits: `[row, vocabulary]`, those of the choice.
        tokens: `[row]` int32: chosen.
        workspace: as the choice left it, with sums without temperature.
        log_probabilities: for the same rows.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    row_count, vocabulary = logits.shape
    top_count = log_probabilities.top.shape[-1]
    check_shape("log_probabilities.chosen", log_probabilities.chosen, (row_count,))
    check_shape("log_probabilities.top", log_probabilities.top, (row_count, top_count))
    check_shape("log_probabilities.top_tokens", log_probabilities.top_tokens, (row_count, top_count))
    check_dtype("log_probabilities.chosen", log_probabilities.chosen, (torch.float32,))
    check_dtype("log_probabilities.top", log_probabilities.top, (torch.float32,))
    check_dtype("log_probabilities.top_tokens", log_probabilities.top_tokens, (torch.int32,))
    check_same_device(logits=logits, chosen=log_probabilities.chosen, top=log_probabilities.top)
    run_count = triton.cdiv(vocabulary, RUN)
    _log_probabilities[(row_count,)](
        logits, tokens, workspace.heads, workspace.plain_masses, log_probabilities.chosen,
        log_probabilities.top_tokens, log_probabilities.top, logits.stride(0), vocabulary, run_count,
        TOP=top_count, ALL_RUNS=triton.next_power_of_2(run_count), SIZE=RUN, LANE_BITS=RUN.bit_length() - 1,
        num_warps=4,
    )  # fmt: skip
