"""Triton: one pass over the logits for all rows, then one program a row that looks at what is likely."""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from kernels.checks import check_dtype, check_last_axis_dense, check_same_device, check_shape
from kernels.configs import lookup
from kernels.layout import ACTIVATION_DTYPES
from kernels.sampling import tensors
from kernels.sampling.buckets import WIDE, count, split
from kernels.sampling.draw import cutoff, draw_among, draw_from_all, draw_in_row, first_of, gather, uniform
from kernels.sampling.logprobs import write_reports
from kernels.sampling.order import rank_of
from kernels.sampling.tensors import RUN, Choice, Workspace
from kernels.sampling.wide import MANY, bracket, settle

_SPAN = 16384
"""Tokens of a wide row that one program sums up."""
_WIDE_TILE = 1024


@triton.jit
def _scan(
    logits_ptr,
    temperature_ptr,
    heads_ptr,
    masses_ptr,
    samples_ptr,
    stride_logits: tl.int64,
    vocabulary,
    run_count,
    GREEDY: tl.constexpr,
    PLAIN: tl.constexpr,
    RUNS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Grid (row, group of RUNS runs): the largest logit of each run, and the mass relative to it.

    PLAIN: at temperature 1.
    """
    row = tl.program_id(0).to(tl.int64)
    runs = tl.program_id(1) * RUNS + tl.arange(0, RUNS)
    tokens = runs[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    logits = tl.load(logits_ptr + row * stride_logits + tokens, mask=tokens < vocabulary, other=float("-inf"))
    logits = logits.to(tl.float32)
    heads = tl.max(logits, 1)
    at = row * run_count + runs
    tl.store(heads_ptr + at, heads, mask=runs < run_count)
    if GREEDY:
        # Only whether all of them are numbers: one NaN makes the mass NaN.
        masses = tl.sum(tl.where(logits == logits, 1.0, float("nan")), 1)  # noqa: PLR0124
    else:
        inverse = 1.0
        if not PLAIN:
            sample = tl.sum(tl.where(tokens % SIZE == 0, logits, 0.0), 1)
            tl.store(samples_ptr + at, sample, mask=runs < run_count)
            temperature = tl.load(temperature_ptr + row)
            inverse = 1.0 / tl.where(temperature == 0.0, 1.0, temperature)
        # A run of -inf has no mass; -inf minus -inf would be NaN.
        below = logits - tl.where(heads == float("-inf"), 0.0, heads)[:, None]
        masses = tl.sum(tl.exp(below * inverse), 1)
    tl.store(masses_ptr + at, masses, mask=runs < run_count)


@triton.jit
def _take_first(
    logits_ptr,
    heads_ptr,
    masses_ptr,
    out_ptr,
    stride_logits: tl.int64,
    vocabulary,
    run_count,
    ALL_RUNS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Grid (row,): the first token with the largest logit."""
    row = tl.program_id(0).to(tl.int64)
    runs = tl.arange(0, ALL_RUNS)
    heads = tl.load(heads_ptr + row * run_count + runs, mask=runs < run_count, other=float("-inf"))
    masses = tl.load(masses_ptr + row * run_count + runs, mask=runs < run_count, other=0.0)
    largest = tl.max(heads, 0)
    token = tl.full([], -1, tl.int32)
    # False for NaN and for infinities.
    if (tl.sum(masses, 0) >= 0.0) & (tl.abs(largest) < float("inf")):
        token = first_of(logits_ptr + row * stride_logits, tl.argmax(heads, 0), largest, vocabulary, SIZE)
    tl.store(out_ptr + row, token)


@triton.jit
def _bar(heads, masses, runs, least, largest, inverse, total, top_k, top_p, ROOM: tl.constexpr, SIZE: tl.constexpr):
    """Returns (a bar that about `runs` runs reach, whether the tokens that reach it are enough, and there is room).

    Before any of them is read again: of a run no more tokens reach the bar than its mass allows.
    """
    wanted = tl.where((top_k > 0) & (top_k < runs), top_k, runs)
    cut = cutoff(heads, wanted)
    bar = tl.maximum(cut, least)
    at_bar = tl.exp((bar - largest) * inverse).to(tl.float64)
    others = tl.maximum(masses - tl.exp((heads - largest) * inverse).to(tl.float64), 0.0) * 1.001
    reaches = heads >= bar
    most = tl.minimum(others / tl.maximum(at_bar, 1e-300), SIZE - 1.0) + 1.0
    fits = tl.sum(tl.where(reaches, most, 0.0), 0) <= ROOM
    outside = tl.sum(tl.where(reaches, tl.minimum(others, (SIZE - 1.0) * at_bar), masses), 0)
    everything = (least >= cut) & (least > float("-inf"))
    enough = everything | (total - outside > top_p * total)
    if top_k > 0:
        enough = (top_k <= wanted) | (everything & (top_p >= 1.0))
    return bar, fits & (enough | (bar == float("-inf")))


@triton.jit
def _choose(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_low_ptr,
    seed_high_ptr,
    typical_p_ptr,
    position_ptr,
    heads_ptr,
    masses_ptr,
    values_ptr,
    tokens_ptr,
    found_ptr,
    out_ptr,
    stride_logits: tl.int64,
    vocabulary,
    run_count,
    HEAD: tl.constexpr,
    LANES: tl.constexpr,
    ROOM: tl.constexpr,
    ALL_RUNS: tl.constexpr,
    RUNS: tl.constexpr,
    SIZE: tl.constexpr,
    TOKEN_BITS: tl.constexpr,
):
    """Grid (row,): writes MANY where this program does not hold all candidates, WIDE where they would not be enough."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_logits
    runs = tl.arange(0, ALL_RUNS)
    heads = tl.load(heads_ptr + row * run_count + runs, mask=runs < run_count, other=float("-inf"))
    largest = tl.max(heads, 0)
    temperature = tl.load(temperature_ptr + row)
    inverse = 1.0 / tl.where(temperature == 0.0, 1.0, temperature)
    masses = tl.load(masses_ptr + row * run_count + runs, mask=runs < run_count, other=0.0)
    masses = masses.to(tl.float64) * tl.exp((heads - largest) * inverse).to(tl.float64)
    total = tl.sum(masses, 0)
    token = tl.full([], -1, tl.int32)
    # False for NaN, too.
    if (total > 0.0) & (total < float("inf")):
        if temperature == 0.0:
            token = first_of(logits_ptr, tl.argmax(heads, 0), largest, vocabulary, SIZE)
        else:
            top_k = tl.load(top_k_ptr + row)
            top_k = tl.where(top_k < vocabulary, top_k, 0)
            top_p = tl.load(top_p_ptr + row)
            min_p = tl.load(min_p_ptr + row)
            typical_p = tl.load(typical_p_ptr + row)
            draw = uniform(tl.load(seed_low_ptr + row), tl.load(seed_high_ptr + row), tl.load(position_ptr + row))
            if (top_k <= 0) & (top_p >= 1.0) & (min_p <= 0.0) & (typical_p >= 1.0):
                token = draw_from_all(logits_ptr, masses, draw * total, largest, inverse, vocabulary, ALL_RUNS, SIZE)
            else:
                # Nothing below this can stay; a little less, because it is only compared with what may stay. But what
                # top_k keeps counts for top_p as a whole.
                least = largest + (tl.log(min_p) - 0.001) * temperature
                least = tl.where((top_k > 0) & (top_p < 1.0), float("-inf"), least)
                bar, suffices = _bar(heads, masses, HEAD, least, largest, inverse, total, top_k, top_p, ROOM, SIZE)
                if suffices == 0:
                    # Few runs, whose tokens there is room for in any case.
                    bar, suffices = _bar(
                        heads, masses, ROOM // SIZE, least, largest, inverse, total, top_k, top_p, ROOM, SIZE
                    )
                if suffices:
                    values_ptr += row * ROOM
                    tokens_ptr += row * ROOM
                    count = gather(
                        logits_ptr, heads_ptr + row * run_count, values_ptr, tokens_ptr, bar, vocabulary, run_count,
                        SIZE, RUNS, ROOM,
                    )  # fmt: skip
                    tl.store(found_ptr + row, count)
                    if count <= LANES:
                        places = tl.arange(0, LANES)
                        there = places < count
                        values = tl.load(values_ptr + places, mask=there, other=float("-inf"))
                        ranks = rank_of(values, tl.load(tokens_ptr + places, mask=there, other=0), TOKEN_BITS)
                        ranks = tl.where(there, ranks, 0)
                        likely = tl.exp((values - largest) * inverse)
                        token = draw_among(
                            ranks, values, likely, total, top_k, top_p, min_p, typical_p, temperature, draw, TOKEN_BITS
                        )
                    else:
                        token = tl.where(count <= ROOM, MANY, WIDE)
                else:
                    token = tl.full([], WIDE, tl.int32)
    tl.store(out_ptr + row, token)


@triton.jit
def _choose_in_row(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_low_ptr,
    seed_high_ptr,
    typical_p_ptr,
    position_ptr,
    heads_ptr,
    masses_ptr,
    out_ptr,
    stride_logits: tl.int64,
    vocabulary,
    run_count,
    ALL_RUNS: tl.constexpr,
    TOKEN_BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (row,): the rows that `_choose` left. A kernel of its own, because it needs registers that others do not."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(out_ptr + row) != WIDE:
        return
    runs = tl.arange(0, ALL_RUNS)
    heads = tl.load(heads_ptr + row * run_count + runs, mask=runs < run_count, other=float("-inf"))
    masses = tl.load(masses_ptr + row * run_count + runs, mask=runs < run_count, other=0.0)
    largest = tl.max(heads, 0)
    inverse = 1.0 / tl.load(temperature_ptr + row)
    total = tl.sum(masses.to(tl.float64) * tl.exp((heads - largest) * inverse).to(tl.float64), 0)
    top_k = tl.load(top_k_ptr + row)
    top_k = tl.where(top_k < vocabulary, top_k, 0)
    draw = uniform(tl.load(seed_low_ptr + row), tl.load(seed_high_ptr + row), tl.load(position_ptr + row))
    token = draw_in_row(
        logits_ptr + row * stride_logits, vocabulary, largest, inverse, total, top_k, tl.load(top_p_ptr + row),
        tl.load(min_p_ptr + row), tl.load(typical_p_ptr + row), tl.load(temperature_ptr + row), draw, TOKEN_BITS, TILE,
    )  # fmt: skip
    tl.store(out_ptr + row, token)


def _check(logits: torch.Tensor, workspace: Workspace, out: torch.Tensor) -> tuple[int, int, int]:
    """Checks what all choices share and returns (rows, vocabulary, runs).

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    check_shape("logits", logits, (None, None))
    check_dtype("logits", logits, ACTIVATION_DTYPES)
    check_last_axis_dense("logits", logits)
    row_count, vocabulary = logits.shape
    if vocabulary < 1:
        message = "logits: at least one column expected, found none"
        raise ValueError(message)
    run_count = triton.cdiv(vocabulary, RUN)
    check_shape("out", out, (row_count,))
    check_dtype("out", out, (torch.int32,))
    check_shape("workspace.heads", workspace.heads, (None, run_count))
    if workspace.heads.shape[0] < row_count:
        message = f"workspace: at least {row_count} rows expected, found {workspace.heads.shape[0]}"
        raise ValueError(message)
    check_same_device(logits=logits, workspace=workspace.heads, out=out)
    return row_count, vocabulary, run_count


def _head_count(vocabulary: int, run_count: int) -> int:
    """Returns how many runs have to reach the bar for candidates: their tokens should fill the room by half or more.

    If the likely tokens lie anywhere, n of them hit run_count * (1 - exp(-n / run_count)) runs.
    """
    if vocabulary <= tensors.CANDIDATES:
        return run_count + 1
    return max(1, min(tensors.CANDIDATES // 2, run_count // 2))


def most_likely(logits: torch.Tensor, out: torch.Tensor, workspace: Workspace) -> None:
    """Takes the most likely token of each row, the first of equals. Writes `out`. One pass over the logits.

    Args:
        logits: `[row, vocabulary]`, dense in the last axis; float32, bfloat16 or float16.
        out: `[row]` int32; -1 where a logit is NaN or the largest is infinite.
        workspace: for at least as many rows, of the same vocabulary.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    row_count, vocabulary, run_count = _check(logits, workspace, out)
    if row_count == 0:
        return
    config = lookup("sampling", logits.device, vocabulary=vocabulary)
    _scan[(row_count, triton.cdiv(run_count, config["scan_runs"]))](
        logits, workspace.heads, workspace.heads, workspace.masses, workspace.samples, logits.stride(0), vocabulary,
        run_count, GREEDY=True, PLAIN=True, RUNS=config["scan_runs"], SIZE=RUN, num_warps=config["scan_warps"],
    )  # fmt: skip
    _take_first[(row_count,)](
        logits, workspace.heads, workspace.masses, out, logits.stride(0), vocabulary, run_count,
        ALL_RUNS=triton.next_power_of_2(run_count), SIZE=RUN, num_warps=4,
    )  # fmt: skip


def sample(
    logits: torch.Tensor,
    choice: Choice,
    positions: torch.Tensor,
    out: torch.Tensor,
    workspace: Workspace,
    *,
    scanned: bool = False,
) -> None:
    """Chooses a token for each row. Writes `out`.

    The same (logits, choice, position) give the same token in whatever batch, and nothing waits for the device.

    Args:
        logits: `[row, vocabulary]`, dense in the last axis; float32, bfloat16 or float16. Withheld tokens are -inf.
        choice: how to choose, a row each.
        positions: `[row]` int32 or int64: index in its sequence of the token drawn, the counter of its random number.
        out: `[row]` int32; -1 where a logit is NaN or the largest is infinite.
        workspace: for at least as many rows, of the same vocabulary.
        scanned: the workspace holds the scan of these logits and this temperature: they come from `change_logits`.

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Complexity: three passes over the logits at most: see the README. The first is that of `change_logits` where
        `scanned` says so.
    """
    row_count, vocabulary, run_count = _check(logits, workspace, out)
    check_shape("positions", positions, (row_count,))
    check_dtype("positions", positions, (torch.int32, torch.int64))
    check_same_device(logits=logits, positions=positions, **choice.tensors)
    for name, tensor in choice.tensors.items():
        floats = name in {"temperature", "top_p", "min_p", "typical_p"}
        check_shape(f"choice.{name}", tensor, (row_count,))
        check_dtype(f"choice.{name}", tensor, (torch.float32 if floats else torch.int32,))
        check_last_axis_dense(f"choice.{name}", tensor)
    if row_count == 0:
        return
    config = lookup("sampling", logits.device, vocabulary=vocabulary)
    if not scanned:
        _scan[(row_count, triton.cdiv(run_count, config["scan_runs"]))](
            logits, choice.temperature, workspace.heads, workspace.masses, workspace.samples, logits.stride(0),
            vocabulary, run_count, GREEDY=False, PLAIN=False, RUNS=config["scan_runs"], SIZE=RUN,
            num_warps=config["scan_warps"],
        )  # fmt: skip
    shared = (
        logits, choice.temperature, choice.top_k, choice.top_p, choice.min_p, choice.seed_low, choice.seed_high,
        choice.typical_p, positions, workspace.heads, workspace.masses,
    )  # fmt: skip
    all_runs, token_bits = triton.next_power_of_2(run_count), max(1, (vocabulary - 1).bit_length())
    _choose[(row_count,)](
        *shared, workspace.values, workspace.tokens, workspace.found, out, logits.stride(0), vocabulary, run_count,
        HEAD=_head_count(vocabulary, run_count), LANES=tensors.CANDIDATES, ROOM=workspace.values.shape[1],
        ALL_RUNS=all_runs, RUNS=config["gather_runs"], SIZE=RUN, TOKEN_BITS=token_bits,
        num_warps=config["choose_warps"],
    )  # fmt: skip
    if vocabulary > tensors.CANDIDATES:
        _choose_widely(logits, shared, out, workspace, config)


def _choose_widely(
    logits: torch.Tensor,
    shared: tuple[torch.Tensor, ...],
    out: torch.Tensor,
    workspace: Workspace,
    config: Mapping[str, int],
) -> None:
    """Launches what chooses for the rows that `_choose` left; each program looks first whether its row is one."""
    row_count, vocabulary = logits.shape
    run_count, splits, room = triton.cdiv(vocabulary, RUN), workspace.splits, workspace.values.shape[1]
    all_runs, token_bits = triton.next_power_of_2(run_count), max(1, (vocabulary - 1).bit_length())
    temperature, typical_p = shared[1], shared[7]
    buckets = (workspace.splitters, workspace.counts, workspace.bucket_masses, workspace.moments)
    split[(row_count,)](
        out, workspace.samples, *buckets, run_count, STEP=triton.cdiv(run_count, splits - 1), SPLITS=splits,
        num_warps=8,
    )  # fmt: skip
    count[(row_count, triton.cdiv(vocabulary, _SPAN))](
        logits, temperature, typical_p, workspace.heads, out, *buckets, logits.stride(0), vocabulary, run_count,
        ALL_RUNS=all_runs, SPAN=_SPAN, TILE=_WIDE_TILE, SPLITS=splits, SPLIT_BITS=splits.bit_length() - 1,
        num_warps=8,
    )  # fmt: skip
    gathered = (
        out, workspace.found, workspace.equal_found, workspace.first, workspace.values, workspace.tokens,
        workspace.members, workspace.equals, workspace.equal_members, *buckets, workspace.flags,
    )  # fmt: skip
    shape = {"ALL_RUNS": all_runs, "ROOM": room, "SPLITS": splits, "SPLIT_BITS": splits.bit_length() - 1}
    bracket[(row_count,)](
        *shared, *gathered, logits.stride(0), vocabulary, run_count, TILE=_WIDE_TILE, **shape, num_warps=8
    )
    settle[(row_count,)](*shared[1:], *gathered, vocabulary, run_count, TOKEN_BITS=token_bits, **shape, num_warps=8)
    _choose_in_row[(row_count,)](
        *shared, out, logits.stride(0), vocabulary, run_count, ALL_RUNS=all_runs, TOKEN_BITS=token_bits,
        TILE=config["tile"], num_warps=4,
    )  # fmt: skip


def report(
    logits: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor, reports: torch.Tensor, workspace: Workspace
) -> None:
    """Reports the log-probability of a given token in each row, and those of the most likely ones. Writes `reports`.

    Args:
        logits: `[row, vocabulary]`, dense in the last axis; float32, bfloat16 or float16.
        tokens: see `logprobs.write_reports`.
        counts: see there.
        reports: see there.
        workspace: for at least as many rows, of the same vocabulary.

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Complexity: a pass over the logits, and what `write_reports` reads again.
    """
    row_count, vocabulary, run_count = _check(logits, workspace, tokens)
    if row_count == 0:
        return
    config = lookup("sampling", logits.device, vocabulary=vocabulary)
    heads, masses = workspace.plain_heads, workspace.plain_masses
    _scan[(row_count, triton.cdiv(run_count, config["scan_runs"]))](
        logits, heads, heads, masses, workspace.samples, logits.stride(0), vocabulary, run_count, GREEDY=False,
        PLAIN=True, RUNS=config["scan_runs"], SIZE=RUN, num_warps=config["scan_warps"],
    )  # fmt: skip
    write_reports(logits, tokens, counts, heads, masses, reports)
