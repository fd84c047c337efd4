"""Triton: the parts of a choice that one program makes for one row."""

import triton
import triton.language as tl

from kernels.sampling.order import (
    find_among,
    find_in_row,
    key_of,
    nearness,
    reach_among,
    sums_in_row,
    token_of,
    value_of,
)


@triton.jit
def uniform(seed_low, seed_high, position):
    """Returns a number in [0, 1) with 53 random bits: Philox4x32-10 with the seed as key and position as counter."""
    seed = (seed_high.to(tl.uint32).to(tl.uint64) << 32) | seed_low.to(tl.uint32).to(tl.uint64)
    counter = position.to(tl.uint64)
    zero = tl.zeros_like(counter).to(tl.uint32)
    high, low, _, _ = tl.philox(seed, counter.to(tl.uint32), (counter >> 32).to(tl.uint32), zero, zero)
    bits = ((high >> 5).to(tl.uint64) << 26) | (low >> 6).to(tl.uint64)
    return bits.to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def first_of(logits_ptr, run, largest, vocabulary, SIZE: tl.constexpr):
    """Returns the first token of a run whose logit is `largest`."""
    tokens = run * SIZE + tl.arange(0, SIZE)
    logits = tl.load(logits_ptr + tokens, mask=tokens < vocabulary, other=float("-inf")).to(tl.float32)
    return run * SIZE + tl.argmax((logits == largest).to(tl.int32), 0)


@triton.jit
def _pick(masses, before, target, COUNT: tl.constexpr):
    """Returns the first place at which `before` plus the running sum exceeds `target`; never one without mass."""
    places = tl.arange(0, COUNT)
    place = tl.sum((tl.cumsum(masses, 0) + before <= target).to(tl.int32), 0)
    return tl.minimum(place, tl.max(tl.where(masses > 0.0, places, 0), 0))


@triton.jit
def draw_from_all(logits_ptr, masses, target, largest, inverse, vocabulary, RUNS: tl.constexpr, SIZE: tl.constexpr):
    """Returns the token that a draw points at in the order of the vocabulary: one run is read again."""
    run = _pick(masses, 0.0, target, RUNS)
    before = tl.sum(tl.where(tl.arange(0, RUNS) < run, masses, 0.0), 0)
    tokens = run * SIZE + tl.arange(0, SIZE)
    logits = tl.load(logits_ptr + tokens, mask=tokens < vocabulary, other=float("-inf")).to(tl.float32)
    return run * SIZE + _pick(tl.exp((logits - largest) * inverse).to(tl.float64), before, target, SIZE)


@triton.jit
def draw_among(
    ranks, values, masses, total, top_k, top_p, min_p, typical_p, temperature, draw, TOKEN_BITS: tl.constexpr
):
    """Returns the token that a draw points at, most likely first, among those that the rules of a choice keep.

    Args:
        ranks: of the candidates; 0 for none.
        values: their logits.
        masses: theirs, relative to the most likely token's.
        total: mass of all tokens, candidates or not.
        top_k: 0 for all.
        top_p: see `kernels.sampling.tensors.Choice`.
        min_p: see there.
        typical_p: see there.
        temperature: what the logits are divided by.
        draw: in [0, 1).
        TOKEN_BITS: of the ranks.
    """
    bound = tl.full([1], 1, tl.int64)
    if top_k > 0:
        bound = tl.maximum(bound, find_among(ranks, (ranks > 0).to(tl.float32), top_k - 0.5, TOKEN_BITS))
        total = tl.sum(tl.where(ranks >= bound, masses, 0.0), 0).to(tl.float64)
    if top_p < 1.0:
        bound = tl.maximum(bound, reach_among(ranks, masses, top_p * total, TOKEN_BITS))
    keeps = (ranks >= bound) & (masses >= min_p)
    if typical_p < 1.0:
        weights = tl.where(keeps, masses, 0.0).to(tl.float64)
        scaled = tl.where(weights > 0.0, tl.div_rn(values, tl.zeros_like(values) + temperature), 0.0)
        mass = tl.sum(weights, 0)
        mean = tl.sum(weights * scaled.to(tl.float64), 0) / mass
        nearest = tl.where(keeps, nearness(values, mean, temperature, ranks, TOKEN_BITS), 0)
        near = reach_among(nearest, tl.where(keeps, masses, 0.0), typical_p * mass, TOKEN_BITS)
        keeps = keeps & (nearest >= near)
    kept = tl.where(keeps, masses, 0.0)
    drawn = find_among(ranks, kept, draw * tl.sum(kept, 0).to(tl.float64), TOKEN_BITS)
    # Rounding may leave the target at the sum itself; then the last one kept is meant.
    last = tl.min(tl.where(keeps & (masses > 0.0), ranks, 9223372036854775807), 0)
    return token_of(tl.maximum(drawn, last), TOKEN_BITS)


@triton.jit
def draw_in_row(
    logits_ptr,
    vocabulary,
    largest,
    inverse,
    total,
    top_k,
    top_p,
    min_p,
    typical_p,
    temperature,
    draw,
    TOKEN_BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """As `draw_among` for a whole row."""
    bound = tl.full([], 1, tl.int64)
    if top_k > 0:
        counted = find_in_row(
            logits_ptr, vocabulary, largest, inverse, temperature, 0, 0.0, 0.0, 0, top_k - 0.5, False, False, False,
            TOKEN_BITS, TILE,
        )  # fmt: skip
        bound = tl.maximum(bound, counted)
        total, _ = sums_in_row(
            logits_ptr, vocabulary, largest, inverse, temperature, bound, 0.0, 0.0, 0, TOKEN_BITS, TILE
        )
    if top_p < 1.0:
        reached = find_in_row(
            logits_ptr, vocabulary, largest, inverse, temperature, 0, 0.0, 0.0, 0, top_p * total, True, False, True,
            TOKEN_BITS, TILE,
        )  # fmt: skip
        bound = tl.maximum(bound, reached)
    near = tl.zeros([], tl.int64)
    mean = tl.zeros([], tl.float64)
    kept, moment = sums_in_row(
        logits_ptr, vocabulary, largest, inverse, temperature, bound, min_p, mean, near, TOKEN_BITS, TILE
    )
    if typical_p < 1.0:
        mean = moment / kept
        near = find_in_row(
            logits_ptr, vocabulary, largest, inverse, temperature, bound, min_p, mean, 0, typical_p * kept, True, True,
            True, TOKEN_BITS, TILE,
        )  # fmt: skip
        kept, _ = sums_in_row(
            logits_ptr, vocabulary, largest, inverse, temperature, bound, min_p, mean, near, TOKEN_BITS, TILE
        )
    drawn = find_in_row(
        logits_ptr, vocabulary, largest, inverse, temperature, bound, min_p, mean, near, draw * kept, True, False,
        False, TOKEN_BITS, TILE,
    )  # fmt: skip
    return token_of(tl.maximum(drawn, bound), TOKEN_BITS)


@triton.jit
def cutoff(heads, wanted):
    """Returns the largest number that at least `wanted` of the runs reach; -inf if there are fewer runs."""
    keys = tl.where(heads == float("-inf"), 0, key_of(heads))
    found = tl.zeros([1], tl.int64)
    for step in range(32):
        trial = found + (tl.full([1], 1, tl.int64) << (31 - step))
        enough = tl.sum((keys >= trial).to(tl.int32), 0) >= wanted
        found = tl.where(enough, trial, found)
    key = tl.max(found, 0)
    return tl.where(key == 0, float("-inf"), value_of(key))


@triton.jit
def gather(
    logits_ptr,
    heads_ptr,
    values_ptr,
    tokens_ptr,
    cutoff,
    vocabulary,
    run_count,
    SIZE: tl.constexpr,
    RUNS: tl.constexpr,
    ROOM: tl.constexpr,
):
    """Writes the tokens that reach `cutoff`, as far as there is room, and returns how many there are."""
    count = tl.zeros([1], tl.int32)
    for group in range(0, run_count, RUNS):
        runs = group + tl.arange(0, RUNS)
        heads = tl.load(heads_ptr + runs, mask=runs < run_count, other=float("-inf"))
        if tl.max(heads, 0) >= cutoff:
            tokens = group * SIZE + tl.arange(0, RUNS * SIZE)
            inside = tokens < vocabulary
            logits = tl.load(logits_ptr + tokens, mask=inside, other=float("-inf")).to(tl.float32)
            likely = (logits >= cutoff) & inside
            places = count + tl.cumsum(likely.to(tl.int32), 0) - 1
            tl.store(values_ptr + places, logits, mask=likely & (places < ROOM))
            tl.store(tokens_ptr + places, tokens, mask=likely & (places < ROOM))
            count += tl.sum(likely.to(tl.int32), 0)
    # What some threads wrote, others read.
    tl.debug_barrier()
    return tl.max(count, 0)
