"""How much a cached block is worth keeping, in one byte, and how that decays.

A class is a priority (1 .. 10, tens of a hundred) and a time to live (2^0 .. 2^19 seconds). The worth of a retained
block that nobody uses is its priority, halved for every half-life since its release; at the end of its time to live it
is nothing. Of two blocks with one half-life, which is worth less never changes: the worth at any time orders them as
release + half_life * log2(priority) does. So the blocks of one class, in order of release, are in order of worth and of
expiry, and nothing is ever sorted anew because time has passed.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

PRIORITY_MAXIMUM: Final = 100
TTL_MAXIMUM: Final = 2**19
"""Seconds: six days."""
TTL_DEFAULT: Final = 600
SESSION_PRIORITY: Final = 50
"""Of a session whose request names no priority."""
HALF_LIFE: Final = 600.0
"""Seconds in which the worth of a block that nobody uses halves."""

NONE: Final = 0
"""Not retained."""
PINNED: Final = 255
"""Kept until an operator releases it."""

_STEP: Final = 10
_TTL_COUNT: Final = 20

Floats = npt.NDArray[np.float64]


def retention_class(priority: int, ttl: int) -> int:
    """Returns the class of a priority (1 .. 100, rounded up to tens) and a time to live (s, to a power of two)."""
    return (-(-priority // _STEP) - 1) * _TTL_COUNT + (ttl - 1).bit_length() + 1


def asked_for(priority: int, ttl: int, *, session: bool) -> int:
    """Returns the class that a request asks for, NONE if it does not.

    Args:
        priority: 0 .. 100, 0 if it is not said.
        ttl: seconds, 0 if it is not said.
        session: whether the request is a turn of one.
    """
    if not priority and not session:
        return NONE
    return retention_class(priority or SESSION_PRIORITY, ttl or TTL_DEFAULT)


def time_to_live(retention: int) -> float:
    """Returns the seconds after release at which a class is worth nothing."""
    return float(1 << ((retention - 1) % _TTL_COUNT))


def priority(retention: int) -> int:
    """Returns the priority of a class at release, 1 .. 100; 0 for none."""
    return ((retention - 1) // _TTL_COUNT + 1) * _STEP if NONE < retention < PINNED else 0


def head_start(retention: int) -> float:
    """Returns the seconds by which a class is ahead of one of priority 1: half_life * log2(priority)."""
    return HALF_LIFE * float(np.log2(priority(retention)))
