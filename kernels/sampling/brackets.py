"""Triton: in which buckets of a row the cuts of a choice and its draw lie, from the sums of the buckets alone.

Each cut is relative to what the one before has kept. That is known to within a token or so: how many tokens top_k keeps
of its last bucket, by how little top_p exceeds its share. So every cut is in one bucket, or in a few.
"""

import triton
import triton.language as tl

MEMBER = tl.constexpr(1)
"""Flag of a bucket whose tokens are gathered to cut among them."""
EQUAL = tl.constexpr(2)
"""Flag of a bucket of equal tokens that are gathered to find one by its number."""
INNER = tl.constexpr(4)
"""Flag of a bucket that typical_p keeps as a whole."""
_SLACK = tl.constexpr(1e-9)


@triton.jit
def _highest(sums, target):
    """Returns the highest bucket from which upwards there is more than `target`, by `sums` of all from each upwards.

    Two ways to a sum differ in the last digits: with a factor on the target that leaves room for them.
    """
    return tl.maximum(tl.sum((sums > target).to(tl.int32), 0) - 1, 0)


@triton.jit
def _from(weights):
    """Returns for each bucket the sum of it and all above."""
    return tl.sum(weights, 0) - tl.cumsum(weights, 0) + weights


@triton.jit
def value_at(values, buckets, bucket):
    """Returns the value of one bucket."""
    return tl.sum(tl.where(buckets == bucket, values, 0), 0)


@triton.jit
def _reach(weights_in, distances_in, weights_out, distances_out, target_in, target_out):
    """Returns (smallest distance within which there may be enough, that within which there surely is)."""
    low = tl.zeros([], tl.int32)
    high = tl.zeros([], tl.int32)
    for step in range(31):
        bit = tl.full([], 1, tl.int32) << (30 - step)
        near = tl.sum(tl.where(distances_out < (low | bit), weights_out, 0.0), 0)
        low = tl.where(near < target_out, low | bit, low)
        near = tl.sum(tl.where(distances_in < (high | bit), weights_in, 0.0), 0)
        high = tl.where(near < target_in, high | bit, high)
    return low, high


@triton.jit
def bits_of(distance):
    """Returns integers that order like non-negative distances."""
    return tl.maximum(distance, 0.0).to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def _cuts(buckets, counts, masses, near_mass, far_mass, top_k, top_p):
    """Returns (lowest, highest bucket that may hold the last cut, least, most mass kept of it, buckets of all cuts).

    Of top_k and top_p. The masses are infinite where more than one bucket may hold the last cut.
    """
    from_here = _from(masses)
    low_total = tl.sum(masses, 0)
    high_total = low_total
    lowest = tl.zeros([], tl.int32)
    highest = tl.full([], -1, tl.int32)
    # At least and at most this mass is kept of the lowest bucket, if it is known which one that is.
    low_part = tl.full([], float("inf"), tl.float64)
    high_part = tl.full([], float("inf"), tl.float64)
    needed = buckets < 0
    if top_k > 0:
        lowest = _highest(_from(counts), top_k - 0.5)
        highest = lowest
        needed = buckets == lowest
        high_total = value_at(from_here, buckets, lowest)
        whole = value_at(masses, buckets, lowest)
        # How many tokens of the bucket are kept is known, and they are nearly alike.
        rest = value_at(_from(counts), buckets, lowest) - top_k
        left = value_at(counts, buckets, lowest) - rest
        near, far = (
            value_at(near_mass, buckets, lowest).to(tl.float64),
            value_at(far_mass, buckets, lowest).to(tl.float64),
        )
        low_part = tl.maximum(left * far, whole - rest * near) * (1.0 - _SLACK)
        high_part = tl.minimum(tl.minimum(left * near, whole - rest * far) * (1.0 + _SLACK), whole)
        low_total = high_total - whole + low_part
        high_total = high_total - whole + high_part
    if top_p < 1.0:
        low_cut = _highest(from_here, top_p * high_total * (1.0 + _SLACK))
        high_cut = _highest(from_here, top_p * low_total * (1.0 - _SLACK))
        needed = needed | ((buckets >= low_cut) & (buckets <= high_cut))
        if (low_cut == high_cut) & (low_cut >= lowest):
            # What is kept exceeds the target by less than a token.
            above = value_at(from_here, buckets, low_cut) - value_at(masses, buckets, low_cut)
            one = value_at(near_mass, buckets, low_cut).to(tl.float64)
            low_part = tl.minimum(tl.where(low_cut == lowest, low_part, float("inf")), top_p * low_total - above)
            high_part = tl.where(low_cut == lowest, high_part, float("inf"))
            high_part = tl.minimum(high_part, top_p * high_total - above + one)
        elif low_cut > lowest:
            low_part = tl.full([], float("inf"), tl.float64)
            high_part = tl.full([], float("inf"), tl.float64)
        lowest = tl.maximum(lowest, low_cut)
        highest = tl.maximum(highest, high_cut)
    return lowest, highest, low_part, high_part, needed


@triton.jit
def _near_mean(buckets, low, high, masses, each, moments, near_edge, far_edge, near_mass, lowest, typical_p):
    """Returns (least, most mass that typical_p keeps of each bucket, least, most of all, inner, unsure buckets)."""
    equal = (buckets & 1) == 1
    low_kept, high_kept = tl.sum(low, 0), tl.sum(high, 0)
    shares = moments / tl.maximum(masses, 1e-300)
    nearer = tl.where(buckets == lowest, near_edge, shares)
    nearer = tl.where(low > 0.0, nearer, 0.0)
    # What may be kept besides is below all that is: it only draws the mean downwards.
    low_mean = tl.sum(low * nearer, 0) / tl.maximum(low_kept, 1e-300)
    high_mean = tl.sum(high * shares, 0) / high_kept
    nearest = bits_of(tl.maximum(near_edge - high_mean, low_mean - far_edge) * 0.999999)
    farthest = bits_of(tl.maximum(far_edge - low_mean, high_mean - near_edge) * 1.000001)
    low_near, high_near = _reach(low, farthest, high, nearest, typical_p * high_kept, typical_p * low_kept)
    inner = farthest < low_near
    unsure = (nearest <= high_near) & (inner == 0) & (high > 0.0)
    inside = tl.sum(tl.where(inner, low, 0.0), 0)
    outside = tl.sum(tl.where(inner, high, 0.0), 0)
    alone = (tl.sum(unsure.to(tl.int32), 0) == 1) & unsure & equal
    high = tl.where(inner | unsure, high, 0.0)
    low = tl.where(inner, low, 0.0)
    high = tl.where(alone, tl.minimum(high, tl.maximum(typical_p * high_kept - inside, 0.0) + each), high)
    low = tl.where(alone, tl.minimum(high, tl.maximum(typical_p * low_kept - outside, 0.0)), low)
    least = typical_p * low_kept
    most = typical_p * high_kept + tl.max(tl.where(unsure, near_mass, 0.0), 0).to(tl.float64)
    return low, high, least, most, inner, unsure


@triton.jit
def flags_of(
    buckets, counts, masses, moments, near_edge, far_edge, near_mass, far_mass, top_k, top_p, min_p, typical_p, draw
):
    """Returns (which tokens of each bucket are needed, first number of an equal token that may be drawn).

    Args:
        buckets: 0 .. number of buckets - 1, in the order of their logits.
        counts: of tokens, float64.
        masses: float64.
        moments: sums of mass times how far a scaled logit is below the largest, float64.
        near_edge: how far the upper edge of each bucket is below the largest, float64.
        far_edge: the same of the lower edge.
        near_mass: mass of a token at the upper edge.
        far_mass: the same at the lower edge.
        top_k: 0 for all.
        top_p: see `kernels.sampling.tensors.Choice`.
        min_p: see there.
        typical_p: see there.
        draw: in [0, 1).
    """
    equal = (buckets & 1) == 1
    each = masses / tl.maximum(counts, 1.0)
    lowest, highest, low_part, high_part, needed = _cuts(buckets, counts, masses, near_mass, far_mass, top_k, top_p)
    # Exponentials at the edges are compared with those of tokens: with room for their rounding.
    maybe = (buckets >= lowest) & (near_mass * 1.0001 >= min_p)
    sure = (far_mass * 0.9999 >= min_p) & (buckets >= lowest)
    needed = needed | (maybe & (sure == 0))
    high = tl.where(maybe, masses, 0.0)
    low = tl.where(sure & (buckets > highest), masses, 0.0)
    if (lowest == highest) & (high_part < float("inf")):
        high = tl.where(maybe & (buckets == lowest), tl.minimum(masses, tl.maximum(high_part, 0.0)), high)
        low = tl.where(sure & (buckets == lowest), tl.minimum(masses, tl.maximum(low_part, 0.0)), low)
    inner = buckets < 0
    least = tl.zeros([], tl.float64)
    most = tl.full([], float("inf"), tl.float64)
    if typical_p < 1.0:
        low, high, least, most, inner, unsure = _near_mean(
            buckets, low, high, masses, each, moments, near_edge, far_edge, near_mass, lowest, typical_p
        )
        needed = needed | unsure
    low_from, high_from = _from(low), _from(high)
    low_kept = tl.maximum(tl.sum(low, 0), least)
    high_kept = tl.minimum(tl.sum(high, 0), most)
    last = tl.min(tl.where(high > 0.0, buckets, 2147483647), 0)
    low_draw = tl.maximum(_highest(low_from, draw * high_kept * (1.0 + _SLACK)), last)
    high_draw = tl.maximum(_highest(high_from, draw * low_kept * (1.0 - _SLACK)), last)
    drawn = (high > 0.0) & (buckets >= low_draw) & (buckets <= high_draw)
    # Of equal tokens without company it is known within a little which number is drawn: only those are gathered.
    first = tl.zeros([], tl.float64)
    if tl.sum(drawn.to(tl.int32), 0) == 1:
        above = tl.sum(tl.where(buckets > low_draw, high, 0.0), 0)
        one = tl.max(tl.where(drawn, each, 0.0), 0)
        first = tl.maximum((draw * low_kept - above) / tl.maximum(one, 1e-300) - 2.0, 0.0)
    flags = tl.where(needed & (equal == 0) & (counts > 0.0), MEMBER, 0)
    flags = tl.where(drawn, tl.where(equal, EQUAL, MEMBER), flags) + tl.where(inner, INNER, 0)
    return flags, tl.minimum(first, 2147483647.0).to(tl.int32)
