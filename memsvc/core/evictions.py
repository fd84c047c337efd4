"""What was evicted lately, and when: so that a miss can be explained.

This is told about a pool and no part of its state: no command depends on it, and a replay comes to the same without.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

EVICTIONS_REMEMBERED: Final = 65_536


class EvictionMemory:
    """Identities of blocks that were evicted lately: a ring in columns.

    Half of an identity is kept. It is a digest: that two blocks agree in 64 bits is not to be expected, and would do no
    more than explain a miss wrongly.

    Args:
        capacity: identities that are remembered, the newest.
    """

    __slots__ = ("_capacity", "_next", "_times", "_words")

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._next = 0
        # Zeros where nothing was written yet: no identity.
        self._words = np.zeros(capacity, np.uint64)
        self._times = np.zeros(capacity, np.float64)

    def note(self, words: npt.NDArray[np.uint64], now: float) -> None:
        """Remembers identities by their first words, zeros left aside."""
        start, end = self._next, self._next + len(words)
        if end > self._capacity:
            words = words[-self._capacity :]
            head = words[: self._capacity - start]
            self._words[start : start + len(head)] = head
            self._times[start : start + len(head)] = now
            words = words[len(head) :]
            start, end = 0, len(words)
        self._words[start:end] = words
        self._times[start:end] = now
        self._next = end

    def when(self, identity: bytes) -> float | None:
        """Returns when an identity was evicted last, None if that is not remembered."""
        rows = np.flatnonzero(self._words == np.frombuffer(identity, np.uint64, 1))
        return float(self._times[rows].max()) if len(rows) else None
