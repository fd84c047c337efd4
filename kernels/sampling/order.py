"""Triton: the order of tokens as integers, and searches in it that read a row once for four bits.

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
def _load_tile(logits_ptr, start, vocabulary, largest, inverse, TOKEN_BITS: tl.constexpr, TILE: tl.constexpr):
    """Returns (ranks, masses) of one tile of a row; nothing behind its end."""
    tokens = start + tl.arange(0, TILE)
    inside = tokens < vocabulary
    logits = tl.load(logits_ptr + tokens, mask=inside, other=float("-inf")).to(tl.float32)
    return tl.where(inside, rank_of(logits, tokens, TOKEN_BITS), 0), tl.exp((logits - largest) * inverse)


@triton.jit
def mass_in_row(logits_ptr, vocabulary, largest, inverse, rank, least, TOKEN_BITS: tl.constexpr, TILE: tl.constexpr):
    """Returns the mass of a row's tokens from `rank` upwards that have at least `least` themselves; float64."""
    total = tl.zeros([1], tl.float64)
    for start in range(0, vocabulary, TILE):
        ranks, masses = _load_tile(logits_ptr, start, vocabulary, largest, inverse, TOKEN_BITS, TILE)
        total += tl.sum(tl.where((ranks >= rank) & (masses >= least), masses, 0.0), 0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def find_in_row(
    logits_ptr,
    vocabulary,
    largest,
    inverse,
    target,
    BY_MASS: tl.constexpr,
    TOKEN_BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """As `find_among` for a whole row, which is read once for four bits; the sum is of masses, or of ones."""
    trials = tl.arange(0, 16)
    found = tl.zeros([1], tl.int64)
    for step in range((32 + TOKEN_BITS + 3) // 4):
        shift = ((32 + TOKEN_BITS + 3) // 4 - 1 - step) * 4
        bounds = found + (trials.to(tl.int64) << shift)
        sums = tl.zeros([16], tl.float64)
        for start in range(0, vocabulary, TILE):
            ranks, masses = _load_tile(logits_ptr, start, vocabulary, largest, inverse, TOKEN_BITS, TILE)
            weights = masses
            if not BY_MASS:
                weights = (ranks > 0).to(tl.float32)
            above = ranks[:, None] >= bounds[None, :]
            sums += tl.sum(tl.where(above, weights[:, None], 0.0), 0).to(tl.float64)
        reached = tl.sum((sums > target).to(tl.int32), 0)
        found += tl.maximum(reached - 1, 0).to(tl.int64) << shift
    return tl.max(found, 0)
