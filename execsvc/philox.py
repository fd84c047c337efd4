"""Philox4x32-10: random numbers as a pure function of (key, counter).

The draw at a position must not depend on what else is in the batch, nor on how often a step was repeated, so there is
no generator with a state. Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC11).
"""

import numpy as np
import numpy.typing as npt

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_ROUNDS = 10

Words = npt.NDArray[np.uint64]


def philox4x32(counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]) -> tuple[Words, ...]:
    """Returns four words of 32 random bits (in uint64 arrays) for each row of `counter` and `key` (32-bit words)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (high >> _SHIFT) ^ c1 ^ k0, high & _MASK, (low >> _SHIFT) ^ c3 ^ k1, low & _MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def uniform(seeds: Words, positions: Words) -> npt.NDArray[np.float64]:
    """Returns one number in [0, 1) with 53 random bits for each (seed, position), both 64-bit."""
    zeros = np.zeros_like(seeds)
    counter = (positions & _MASK, positions >> _SHIFT, zeros, zeros)
    high, low, _, _ = philox4x32(counter, (seeds & _MASK, seeds >> _SHIFT))
    mantissa = (high >> np.uint64(5)) << np.uint64(26) | (low >> np.uint64(6))
    return mantissa.astype(np.float64) * 2.0**-53
