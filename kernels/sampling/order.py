"""Triton: the order of tokens as integers, and searches in it that read a row once for three bits.

Tokens are ordered by their logit, those with equal logits by their number. One integer holds both, larger for what
comes first; so there are no ties, and a place in the order (the k-th token, the token at which the probabilities reach
p, the token that a draw points at) is found bit by bit: several trial integers at a time are compared with all tokens.
"""

import triton
import triton.language as tl


@triton.jit
def key_of(value):
    """Returns an integer in [0, 2^32) that orders like the float32 `value`; int64."""
    bits = value.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648


@triton.jit
def value_of(key):
    """Returns the float32 that `key_of` turns into `key`."""
    bits = (key - 2147483648).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def rank_of(value, token, TOKEN_BITS: tl.constexpr):
    """Returns the integer that holds a token's place in the order: larger is more likely."""
    return (key_of(value) << TOKEN_BITS) | ((1 << TOKEN_BITS) - 1 - token).to(tl.int64)


@triton.jit
def token_of(rank, TOKEN_BITS: tl.constexpr):
    """Returns the token of a rank."""
    return ((1 << TOKEN_BITS) - 1 - (rank & ((1 << TOKEN_BITS) - 1))).to(tl.int32)


@triton.jit
def find_among(ranks, masses, target, TOKEN_BITS: tl.constexpr):
    """Returns the rank of the token at which the sum of masses, most likely first, exceeds `target`.

    Returns 0 if it never does.

    Args:
        ranks: a vector of them; 0 for no token.
        masses: theirs, float32.
        target: what is to be exceeded.
        TOKEN_BITS: of the ranks.
    """
    # Eight trials and not sixteen: all comparisons are in registers at once.
    trials = tl.arange(0, 8)
    found = tl.zeros([1], tl.int64)
    for step in range((32 + TOKEN_BITS + 2) // 3):
        shift = ((32 + TOKEN_BITS + 2) // 3 - 1 - step) * 3
        bounds = found + (trials.to(tl.int64) << shift)
        above = ranks[:, None] >= bounds[None, :]
        sums = tl.sum(tl.where(above, masses[:, None], 0.0), 0)
        reached = tl.sum((sums.to(tl.float64) > target).to(tl.int32), 0)
        found += tl.maximum(reached - 1, 0).to(tl.int64) << shift
    return tl.max(found, 0)


@triton.jit
def reach_among(ranks, masses, target, TOKEN_BITS: tl.constexpr):
    """As `find_among`, of the token at which the sum reaches `target`; a target of 0 is reached by the first one."""
    # One bit at a time, because it is rare; what is compared is `>=`.
    found = tl.zeros([1], tl.int64)
    for step in range(32 + TOKEN_BITS):
        trial = found + (tl.full([1], 1, tl.int64) << (31 + TOKEN_BITS - step))
        total = tl.sum(tl.where(ranks >= trial, masses, 0.0), 0).to(tl.float64)
        found = tl.where((total >= target) & (total > 0.0), trial, found)
    return tl.max(found, 0)


@triton.jit
def nearness(logits, mean, temperature, ranks, TOKEN_BITS: tl.constexpr):
    """Returns integers that are larger for tokens whose surprise is nearer to the expected one, equal ones by number.

    The surprise of a token is the logarithm of all mass less its scaled logit; what is expected is the same with the
    mean of the scaled logits, weighted by mass. Their distance is thus that of the scaled logit from the mean.
    """
    scaled = tl.div_rn(logits, tl.zeros_like(logits) + temperature).to(tl.float64)
    distance = tl.abs(scaled - mean).to(tl.float32).to(tl.int32, bitcast=True)
    return ((2147483647 - distance).to(tl.int64) << TOKEN_BITS) | (ranks & ((1 << TOKEN_BITS) - 1))


@triton.jit
def load_tile(logits_ptr, start, vocabulary, largest, inverse, TOKEN_BITS: tl.constexpr, TILE: tl.constexpr):
    """Returns (logits, ranks, masses) of one tile of a row; nothing behind its end."""
    tokens = start + tl.arange(0, TILE)
    inside = tokens < vocabulary
    logits = tl.load(logits_ptr + tokens, mask=inside, other=float("-inf")).to(tl.float32)
    return logits, tl.where(inside, rank_of(logits, tokens, TOKEN_BITS), 0), tl.exp((logits - largest) * inverse)


@triton.jit
def find_in_row(
    logits_ptr,
    vocabulary,
    largest,
    inverse,
    temperature,
    bound,
    least,
    mean,
    near,
    target,
    BY_MASS: tl.constexpr,
    BY_NEARNESS: tl.constexpr,
    REACH: tl.constexpr,
    TOKEN_BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Returns where, in the order of ranks or of nearness, a sum over a row exceeds (REACH: reaches) `target`.

    The row is read once for three bits. The sum is of masses, or of ones, of the tokens from rank `bound` upwards that
    have at least mass `least` and at least nearness `near`; 0 for any.
    """
    trials = tl.arange(0, 8)
    found = tl.zeros([1], tl.int64)
    for step in range((32 + TOKEN_BITS + 2) // 3):
        shift = ((32 + TOKEN_BITS + 2) // 3 - 1 - step) * 3
        bounds = found + (trials.to(tl.int64) << shift)
        sums = tl.zeros([8], tl.float64)
        for start in range(0, vocabulary, TILE):
            logits, ranks, masses = load_tile(logits_ptr, start, vocabulary, largest, inverse, TOKEN_BITS, TILE)
            weights = masses
            if not BY_MASS:
                weights = (ranks > 0).to(tl.float32)
            places = ranks
            kept = (ranks >= bound) & (masses >= least)
            if BY_NEARNESS or near > 0:
                nearest = nearness(logits, mean, temperature, ranks, TOKEN_BITS)
                kept = kept & (nearest >= near)
                if BY_NEARNESS:
                    places = nearest
            above = places[:, None] >= bounds[None, :]
            sums += tl.sum(tl.where(above, tl.where(kept, weights, 0.0)[:, None], 0.0), 0).to(tl.float64)
        if REACH:
            reached = tl.sum(((sums >= target) & (sums > 0.0)).to(tl.int32), 0)
        else:
            reached = tl.sum((sums > target).to(tl.int32), 0)
        found += tl.maximum(reached - 1, 0).to(tl.int64) << shift
    return tl.max(found, 0)


@triton.jit
def sums_in_row(
    logits_ptr,
    vocabulary,
    largest,
    inverse,
    temperature,
    bound,
    least,
    mean,
    near,
    TOKEN_BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Returns (mass, moment) of the tokens that `find_in_row` sums over; the moment is of their scaled logits."""
    mass = tl.zeros([1], tl.float64)
    moment = tl.zeros([1], tl.float64)
    for start in range(0, vocabulary, TILE):
        logits, ranks, masses = load_tile(logits_ptr, start, vocabulary, largest, inverse, TOKEN_BITS, TILE)
        kept = (ranks >= bound) & (masses >= least) & (masses > 0.0)
        kept = kept & (nearness(logits, mean, temperature, ranks, TOKEN_BITS) >= near)
        weights = tl.where(kept, masses, 0.0).to(tl.float64)
        mass += tl.sum(weights, 0)
        scaled = tl.where(kept, tl.div_rn(logits, tl.zeros_like(logits) + temperature), 0.0)
        moment += tl.sum(weights * scaled.to(tl.float64), 0)
    return tl.sum(mass, 0), tl.sum(moment, 0)
