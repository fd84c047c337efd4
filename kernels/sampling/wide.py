"""Triton: choices that keep more tokens than one program holds, in two more passes over the row.

The first sums up the row's buckets (`buckets.py`). Sums tell in which buckets the cuts of a rule and the draw lie, but
for the few that depend on where in its bucket an earlier cut is. The second pass gathers the tokens of those buckets
alone; with them every cut is exact. Equal tokens are never gathered to cut among them, only to find one by its number.
"""

import triton
import triton.language as tl

from kernels.sampling.brackets import EQUAL, INNER, MEMBER, bits_of, flags_of, value_at
from kernels.sampling.buckets import UNIT, WIDE, bucket_of, scaled_of
from kernels.sampling.draw import uniform
from kernels.sampling.order import rank_of, token_of, value_of

MANY = tl.constexpr(-3)
"""Stands for a token where a row's candidates are gathered already, but too many for `choose`."""


@triton.jit
def _upwards(buckets, masses, member_buckets, member_masses, bucket):
    """Returns the mass from a bucket upwards, members included."""
    whole = tl.sum(tl.where(buckets >= bucket, masses, 0.0), 0)
    return whole + tl.sum(tl.where(member_buckets >= bucket, member_masses, 0.0).to(tl.float64), 0)


@triton.jit
def _bucket_at(buckets, masses, member_buckets, member_masses, target, REACH: tl.constexpr, BUCKET_BITS: tl.constexpr):
    """Returns the highest bucket from which upwards there is more mass than `target` (REACH: as much); 0 if none."""
    found = tl.zeros([], tl.int32)
    for step in range(BUCKET_BITS):
        trial = found | (tl.full([], 1, tl.int32) << (BUCKET_BITS - 1 - step))
        mass = _upwards(buckets, masses, member_buckets, member_masses, trial)
        if REACH:
            found = tl.where((mass >= target) & (mass > 0.0), trial, found)
        else:
            found = tl.where(mass > target, trial, found)
    return found


@triton.jit
def _rank_at(ranks, masses, target, REACH: tl.constexpr, TOKEN_BITS: tl.constexpr):
    """Returns the rank from which upwards there is more mass than `target` (REACH: as much); 0 if none."""
    found = tl.zeros([], tl.int64)
    for step in range(32 + TOKEN_BITS):
        trial = found | (tl.full([], 1, tl.int64) << (31 + TOKEN_BITS - step))
        mass = tl.sum(tl.where(ranks >= trial, masses, 0.0).to(tl.float64), 0)
        if REACH:
            found = tl.where((mass >= target) & (mass > 0.0), trial, found)
        else:
            found = tl.where(mass > target, trial, found)
    return found


@triton.jit
def _cut(
    buckets, masses, each, member_buckets, ranks, member_masses, weights, member_weights, one, target,
    REACH: tl.constexpr, BUCKET_BITS: tl.constexpr, TOKEN_BITS: tl.constexpr,
):  # fmt: skip
    """Returns (masses, member masses) of the first tokens until their weights exceed (REACH: reach) `target`.

    Args:
        buckets: 0 .. number of buckets - 1.
        masses: of what the members do not hold, float64.
        each: of one token of a bucket of equal ones.
        member_buckets: of the members.
        ranks: theirs.
        member_masses: theirs, float32.
        weights: what is summed, a bucket each.
        member_weights: what is summed, a member each.
        one: weight of one token, a bucket of equal ones each.
        target: see above.
        REACH: see above.
        BUCKET_BITS: of the buckets.
        TOKEN_BITS: of the ranks.
    """
    here = _bucket_at(buckets, weights, member_buckets, member_weights, target, REACH, BUCKET_BITS)
    above = _upwards(buckets, weights, member_buckets, member_weights, here + 1)
    # Of equal tokens as many as it takes.
    number = (target - above) / tl.maximum(value_at(one, buckets, here), 1e-300)
    number = tl.ceil(number) if REACH else tl.floor(number) + 1.0
    part = number * value_at(each, buckets, here)
    masses = tl.where(buckets == here, tl.minimum(masses, part), masses)
    masses = tl.where(buckets < here, 0.0, masses)
    mine = member_buckets == here
    rank = _rank_at(ranks, tl.where(mine, member_weights, 0.0), target - above, REACH, TOKEN_BITS)
    return masses, tl.where((member_buckets < here) | (mine & (ranks < rank)), 0.0, member_masses)


@triton.jit
def _typical(
    buckets, masses, each, edges, moments, surely, ranks, member_masses, top, temperature, typical_p,
    TOKEN_BITS: tl.constexpr,
):  # fmt: skip
    """Returns (masses, member masses) of the tokens whose surprise is nearest to the expected one.

    Args:
        buckets: 0 .. number of buckets - 1.
        masses: of what the members do not hold and earlier rules keep, float64.
        each: of one token of a bucket of equal ones.
        edges: how far a bucket of equal tokens is below the largest; float64.
        moments: mass times how far the kept tokens of each bucket are below the largest.
        surely: whether a bucket whose tokens are not equal is kept as a whole; else nothing of it is.
        ranks: of the members.
        member_masses: theirs, float32.
        top: the largest logit, scaled, float64.
        temperature: what logits are divided by.
        typical_p: see `kernels.sampling.tensors.Choice`.
        TOKEN_BITS: of the ranks.
    """
    kept = tl.sum(masses, 0) + tl.sum(member_masses.to(tl.float64), 0)
    below = tl.where(member_masses > 0.0, top - scaled_of(value_of(ranks >> TOKEN_BITS), temperature), 0.0)
    mean = (tl.sum(moments, 0) + tl.sum(member_masses.to(tl.float64) * below, 0)) / kept
    equal = (buckets & 1) == 1
    masses = tl.where(equal | surely, masses, 0.0)
    distances = tl.where(equal, bits_of(tl.abs(edges - mean)), 0)
    member_distances = bits_of(tl.abs(top - scaled_of(value_of(ranks >> TOKEN_BITS), temperature) - mean))
    target = typical_p * kept
    found = tl.zeros([], tl.int32)
    for step in range(31):
        trial = found | (tl.full([], 1, tl.int32) << (30 - step))
        near = tl.sum(tl.where(distances < trial, masses, 0.0), 0)
        near += tl.sum(tl.where(member_distances < trial, member_masses, 0.0).to(tl.float64), 0)
        found = tl.where(near < target, trial, found)
    less = tl.sum(tl.where((distances < found) | (equal == 0), masses, 0.0), 0)
    less += tl.sum(tl.where(member_distances < found, member_masses, 0.0).to(tl.float64), 0)
    left = target - less
    part = tl.ceil(left / tl.maximum(each, 1e-300)) * each
    masses = tl.where(equal & (distances == found), tl.minimum(masses, part), masses)
    masses = tl.where(equal & (distances > found), 0.0, masses)
    mine = member_distances == found
    rank = _rank_at(ranks, tl.where(mine, member_masses, 0.0), left, True, TOKEN_BITS)
    return masses, tl.where((member_distances > found) | (mine & (ranks < rank)), 0.0, member_masses)


@triton.jit
def _edges(splitters_ptr, buckets, largest, temperature, inverse):
    """Returns (upper edge, lower edge, mass of a token there, mass there): edges as how far below the largest."""
    upper = tl.load(splitters_ptr + (buckets >> 1))
    lower = tl.load(splitters_ptr + (buckets >> 1) - 1, mask=buckets > 1, other=float("-inf"))
    upper = tl.minimum(upper, largest)
    lower = tl.minimum(tl.where((buckets & 1) == 1, upper, lower), largest)
    top = scaled_of(largest, temperature)
    near_mass, far_mass = tl.exp((upper - largest) * inverse), tl.exp((lower - largest) * inverse)
    return top - scaled_of(upper, temperature), top - scaled_of(lower, temperature), near_mass, far_mass


@triton.jit
def _gather(
    logits_ptr, splitters_ptr, flags_ptr, values_ptr, tokens_ptr, members_ptr, equals_ptr, equal_members_ptr,
    vocabulary, first, TILE: tl.constexpr, ROOM: tl.constexpr, SPLITS: tl.constexpr, SPLIT_BITS: tl.constexpr,
):  # fmt: skip
    """Writes the tokens that are needed, as far as there is room; returns (members, equal ones) that there are."""
    count = tl.zeros([], tl.int32)
    equal_count = tl.zeros([], tl.int32) - first
    for start in range(0, vocabulary, TILE):
        tokens = start + tl.arange(0, TILE)
        inside = tokens < vocabulary
        logits = tl.load(logits_ptr + tokens, mask=inside, other=float("-inf")).to(tl.float32)
        buckets = bucket_of(logits, splitters_ptr, SPLITS, SPLIT_BITS)
        flags = tl.load(flags_ptr + buckets, mask=inside, other=0) & 3
        mine = (flags == MEMBER).to(tl.int32)
        places = count + tl.cumsum(mine, 0) - 1
        kept = (mine > 0) & (places < ROOM)
        tl.store(values_ptr + places, logits, mask=kept)
        tl.store(tokens_ptr + places, tokens, mask=kept)
        tl.store(members_ptr + places, buckets, mask=kept)
        count += tl.sum(mine, 0)
        mine = (flags == EQUAL).to(tl.int32)
        places = equal_count + tl.cumsum(mine, 0) - 1
        kept = (mine > 0) & (places >= 0) & (places < ROOM)
        tl.store(equals_ptr + places, tokens, mask=kept)
        tl.store(equal_members_ptr + places, buckets, mask=kept)
        equal_count += tl.sum(mine, 0)
    return count, tl.minimum(tl.maximum(equal_count, 0), ROOM)


@triton.jit
def _row_of(heads_ptr, run_masses_ptr, inverse, row, run_count, ALL_RUNS: tl.constexpr):
    """Returns (largest logit, mass of all tokens) of a row, from its scan."""
    runs = tl.arange(0, ALL_RUNS)
    heads = tl.load(heads_ptr + row * run_count + runs, mask=runs < run_count, other=float("-inf"))
    largest = tl.max(heads, 0)
    masses = tl.load(run_masses_ptr + row * run_count + runs, mask=runs < run_count, other=0.0).to(tl.float64)
    return largest, tl.sum(masses * tl.exp((heads - largest) * inverse).to(tl.float64), 0)


@triton.jit
def bracket(
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
    run_masses_ptr,
    out_ptr,
    found_ptr,
    equal_found_ptr,
    first_ptr,
    values_ptr,
    tokens_ptr,
    members_ptr,
    equals_ptr,
    equal_members_ptr,
    splitters_ptr,
    counts_ptr,
    masses_ptr,
    moments_ptr,
    flags_ptr,
    stride_logits: tl.int64,
    vocabulary,
    run_count,
    ALL_RUNS: tl.constexpr,
    TILE: tl.constexpr,
    ROOM: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_BITS: tl.constexpr,
):
    """Grid (row,): gathers what is needed of rows that are WIDE."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(out_ptr + row) != WIDE:
        return
    temperature = tl.load(temperature_ptr + row)
    inverse = 1.0 / temperature
    largest, _ = _row_of(heads_ptr, run_masses_ptr, inverse, row, run_count, ALL_RUNS)
    top_k = tl.load(top_k_ptr + row)
    top_k = tl.where(top_k < vocabulary, top_k, 0)
    draw = uniform(tl.load(seed_low_ptr + row), tl.load(seed_high_ptr + row), tl.load(position_ptr + row))
    buckets = tl.arange(0, 2 * SPLITS)
    splitters_ptr += row * SPLITS
    at = row * 2 * SPLITS + buckets
    counts = tl.load(counts_ptr + at).to(tl.float64)
    masses = tl.load(masses_ptr + at).to(tl.float64) / UNIT
    moments = tl.load(moments_ptr + at).to(tl.float64) / UNIT
    near_edge, far_edge, near_mass, far_mass = _edges(splitters_ptr, buckets, largest, temperature, inverse)
    flags, first = flags_of(
        buckets, counts, masses, moments, near_edge, far_edge, near_mass, far_mass, top_k, tl.load(top_p_ptr + row),
        tl.load(min_p_ptr + row), tl.load(typical_p_ptr + row), draw,
    )  # fmt: skip
    tl.store(flags_ptr + at, flags)
    # What some threads wrote, others read.
    tl.debug_barrier()
    count, equal_count = _gather(
        logits_ptr + row * stride_logits, splitters_ptr, flags_ptr + row * 2 * SPLITS, values_ptr + row * ROOM,
        tokens_ptr + row * ROOM, members_ptr + row * ROOM, equals_ptr + row * ROOM, equal_members_ptr + row * ROOM,
        vocabulary, first, TILE, ROOM, SPLITS, SPLIT_BITS,
    )  # fmt: skip
    tl.store(found_ptr + row, count)
    tl.store(equal_found_ptr + row, equal_count)
    tl.store(first_ptr + row, first)


@triton.jit
def _keep(
    buckets, counts, masses, flags, edges, edge_masses, moments_ptr, wide, member_buckets, ranks, there,
    member_masses, total, top_k, top_p, min_p, typical_p, top, temperature, BUCKET_BITS: tl.constexpr,
    TOKEN_BITS: tl.constexpr,
):  # fmt: skip
    """Returns (masses, member masses) of the tokens that the rules of a choice keep; see `_cut`."""
    each = masses / tl.maximum(counts, 1.0)
    held = (flags & 3) == MEMBER
    masses = tl.where(held, 0.0, masses)
    if top_k > 0:
        masses, member_masses = _cut(
            buckets, masses, each, member_buckets, ranks, member_masses, tl.where(held, 0.0, counts),
            there.to(tl.float32), tl.full(counts.shape, 1.0, tl.float64), top_k - 0.5, False, BUCKET_BITS, TOKEN_BITS,
        )  # fmt: skip
    if wide | (top_k > 0):
        total = tl.sum(masses, 0) + tl.sum(member_masses.to(tl.float64), 0)
    if top_p < 1.0:
        masses, member_masses = _cut(
            buckets, masses, each, member_buckets, ranks, member_masses, masses, member_masses, each, top_p * total,
            True, BUCKET_BITS, TOKEN_BITS,
        )  # fmt: skip
    member_masses = tl.where(member_masses >= min_p, member_masses, 0.0)
    masses = tl.where(edge_masses >= min_p, masses, 0.0)
    if typical_p < 1.0:
        moments = tl.load(moments_ptr + buckets, mask=masses > 0.0, other=0).to(tl.float64) / UNIT
        moments = tl.where(masses > 0.0, tl.where((buckets & 1) == 1, masses * edges, moments), 0.0)
        masses, member_masses = _typical(
            buckets, masses, each, edges, moments, (flags & INNER) > 0, ranks, member_masses, top, temperature,
            typical_p, TOKEN_BITS,
        )  # fmt: skip
    return masses, member_masses


@triton.jit
def settle(
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_low_ptr,
    seed_high_ptr,
    typical_p_ptr,
    position_ptr,
    heads_ptr,
    run_masses_ptr,
    out_ptr,
    found_ptr,
    equal_found_ptr,
    first_ptr,
    values_ptr,
    tokens_ptr,
    members_ptr,
    equals_ptr,
    equal_members_ptr,
    splitters_ptr,
    counts_ptr,
    masses_ptr,
    moments_ptr,
    flags_ptr,
    vocabulary,
    run_count,
    ALL_RUNS: tl.constexpr,
    ROOM: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_BITS: tl.constexpr,
    TOKEN_BITS: tl.constexpr,
):
    """Grid (row,): chooses for rows that are WIDE or MANY from what was gathered, if there was room for it."""
    row = tl.program_id(0).to(tl.int64)
    state = tl.load(out_ptr + row)
    count = tl.load(found_ptr + row)
    if ((state != WIDE) & (state != MANY)) | (count > ROOM):
        return
    wide = state == WIDE
    temperature = tl.load(temperature_ptr + row)
    inverse = 1.0 / temperature
    largest, total = _row_of(heads_ptr, run_masses_ptr, inverse, row, run_count, ALL_RUNS)
    top_k = tl.load(top_k_ptr + row)
    top_k = tl.where(top_k < vocabulary, top_k, 0)
    draw = uniform(tl.load(seed_low_ptr + row), tl.load(seed_high_ptr + row), tl.load(position_ptr + row))
    buckets = tl.arange(0, 2 * SPLITS)
    places = tl.arange(0, ROOM)
    there = places < count
    values = tl.load(values_ptr + row * ROOM + places, mask=there, other=float("-inf"))
    ranks = rank_of(values, tl.load(tokens_ptr + row * ROOM + places, mask=there, other=0), TOKEN_BITS)
    ranks = tl.where(there, ranks, 0)
    # Candidates that were gathered before are all in one bucket, and nothing is in any other.
    bucketed = places < tl.where(wide, count, 0)
    member_buckets = tl.load(members_ptr + row * ROOM + places, mask=bucketed, other=0)
    summed = buckets < tl.where(wide, 2 * SPLITS, 0)
    at = row * 2 * SPLITS + buckets
    counts = tl.load(counts_ptr + at, mask=summed, other=0).to(tl.float64)
    masses = tl.load(masses_ptr + at, mask=summed, other=0).to(tl.float64) / UNIT
    flags = tl.load(flags_ptr + at, mask=summed, other=0)
    edges, _, edge_masses, _ = _edges(splitters_ptr + row * SPLITS, buckets, largest, temperature, inverse)
    masses, member_masses = _keep(
        buckets, counts, masses, flags, edges, edge_masses, moments_ptr + row * 2 * SPLITS, wide, member_buckets, ranks,
        there, tl.where(there, tl.exp((values - largest) * inverse), 0.0), total, top_k,
        tl.load(top_p_ptr + row), tl.load(min_p_ptr + row), tl.load(typical_p_ptr + row),
        scaled_of(largest, temperature), temperature, SPLIT_BITS + 1, TOKEN_BITS,
    )  # fmt: skip
    target = draw * (tl.sum(masses, 0) + tl.sum(member_masses.to(tl.float64), 0))
    last = tl.min(tl.where(masses > 0.0, buckets, 2147483647), 0)
    last = tl.minimum(last, tl.min(tl.where(member_masses > 0.0, member_buckets, 2147483647), 0))
    here = tl.maximum(_bucket_at(buckets, masses, member_buckets, member_masses, target, False, SPLIT_BITS + 1), last)
    left = target - _upwards(buckets, masses, member_buckets, member_masses, here + 1)
    token = tl.full([], WIDE, tl.int32)
    if ((here & 1) == 1) & wide:
        at_here = row * 2 * SPLITS + here
        one = tl.load(masses_ptr + at_here).to(tl.float64) / UNIT / tl.load(counts_ptr + at_here).to(tl.float64)
        one = tl.maximum(one, 1e-300)
        most = tl.maximum(tl.ceil(value_at(masses, buckets, here) / one - 0.5), 1.0) - 1.0
        number = tl.minimum(tl.maximum(tl.floor(left / one), 0.0), most).to(tl.int32) - tl.load(first_ptr + row)
        listed = places < tl.load(equal_found_ptr + row)
        mine = listed & (tl.load(equal_members_ptr + row * ROOM + places, mask=listed, other=0) == here)
        wanted = mine & (tl.cumsum(mine.to(tl.int32), 0) == number + 1)
        token = tl.max(tl.where(wanted, tl.load(equals_ptr + row * ROOM + places, mask=listed, other=0), WIDE), 0)
    else:
        weights = tl.where(member_buckets == here, member_masses, 0.0)
        rank = _rank_at(ranks, weights, left, False, TOKEN_BITS)
        # Rounding may leave the target at the sum itself; then the last one is meant.
        rank = tl.maximum(rank, tl.min(tl.where(weights > 0.0, ranks, 9223372036854775807), 0))
        if tl.max(weights, 0) > 0.0:
            token = token_of(rank, TOKEN_BITS)
    tl.store(out_ptr + row, token)
