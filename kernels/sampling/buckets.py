"""Triton: a row cut into buckets by a sample of itself, for choices that keep more tokens than one program holds.

The sample, one token of every run or every few, is sorted. Bucket 2i holds the tokens between samples i - 1 and i,
bucket 2i + 1 those that equal sample i. Whatever the logits are, a bucket between two samples holds few tokens, and of
the others nothing but their number matters: equal tokens are in the order of the vocabulary.
"""

import triton
import triton.language as tl

WIDE = tl.constexpr(-2)
"""Stands for a token where a row is left to `wide`."""
UNIT = tl.constexpr(1099511627776.0)
"""Masses are summed as multiples of 1 / UNIT: integers give the same sum in any order."""


@triton.jit
def scaled_of(logits, temperature):
    """Returns logits over the temperature, as the host divides; float64."""
    return tl.div_rn(logits, tl.zeros_like(logits) + temperature).to(tl.float64)


@triton.jit
def bucket_of(values, splitters_ptr, SPLITS: tl.constexpr, SPLIT_BITS: tl.constexpr):
    """Returns the bucket of each value. The last of the splitters is infinite."""
    place = tl.zeros_like(values).to(tl.int32)
    for step in tl.static_range(SPLIT_BITS):
        middle = tl.load(splitters_ptr + place + ((SPLITS >> (step + 1)) - 1))
        place += tl.where(middle < values, SPLITS >> (step + 1), 0)
    return 2 * place + (tl.load(splitters_ptr + place) == values).to(tl.int32)


@triton.jit
def split(
    out_ptr,
    samples_ptr,
    splitters_ptr,
    counts_ptr,
    masses_ptr,
    moments_ptr,
    run_count,
    STEP: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Grid (row,): sorts a sample of the row, and empties its buckets."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(out_ptr + row) != WIDE:
        return
    places = tl.arange(0, SPLITS)
    there = (places * STEP < run_count) & (places < SPLITS - 1)
    samples = tl.load(samples_ptr + row * run_count + places * STEP, mask=there, other=float("inf"))
    tl.store(splitters_ptr + row * SPLITS + places, tl.sort(samples))
    buckets = row * 2 * SPLITS + tl.arange(0, 2 * SPLITS)
    tl.store(counts_ptr + buckets, tl.zeros([2 * SPLITS], tl.int32))
    tl.store(masses_ptr + buckets, tl.zeros([2 * SPLITS], tl.int64))
    tl.store(moments_ptr + buckets, tl.zeros([2 * SPLITS], tl.int64))


@triton.jit
def count(
    logits_ptr,
    temperature_ptr,
    typical_p_ptr,
    heads_ptr,
    out_ptr,
    splitters_ptr,
    counts_ptr,
    masses_ptr,
    moments_ptr,
    stride_logits: tl.int64,
    vocabulary,
    run_count,
    ALL_RUNS: tl.constexpr,
    SPAN: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_BITS: tl.constexpr,
):
    """Grid (row, SPAN tokens): adds number, mass and moment of the tokens of each bucket.

    The moment is that of how far a scaled logit is below the largest.
    """
    row = tl.program_id(0).to(tl.int64)
    if tl.load(out_ptr + row) != WIDE:
        return
    runs = tl.arange(0, ALL_RUNS)
    heads = tl.load(heads_ptr + row * run_count + runs, mask=runs < run_count, other=float("-inf"))
    largest = tl.max(heads, 0)
    temperature = tl.load(temperature_ptr + row)
    typical = tl.load(typical_p_ptr + row) < 1.0
    inverse = 1.0 / temperature
    top = scaled_of(largest, temperature)
    first = tl.program_id(1) * SPAN
    for start in range(first, tl.minimum(first + SPAN, vocabulary), TILE):
        tokens = start + tl.arange(0, TILE)
        inside = tokens < vocabulary
        logits = tl.load(logits_ptr + row * stride_logits + tokens, mask=inside, other=float("-inf")).to(tl.float32)
        buckets = row * 2 * SPLITS + bucket_of(logits, splitters_ptr + row * SPLITS, SPLITS, SPLIT_BITS)
        masses = tl.exp((logits - largest) * inverse).to(tl.float64)
        tl.atomic_add(counts_ptr + buckets, tl.full([TILE], 1, tl.int32), mask=inside, sem="relaxed")
        units = (masses * UNIT + 0.5).to(tl.int64)
        tl.atomic_add(masses_ptr + buckets, units, mask=inside & (units > 0), sem="relaxed")
        if typical:
            below = tl.where(units > 0, top - scaled_of(logits, temperature), 0.0)
            units = (masses * below * UNIT + 0.5).to(tl.int64)
            tl.atomic_add(moments_ptr + buckets, units, mask=inside & (units > 0), sem="relaxed")
