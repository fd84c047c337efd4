"""How many tokens a cache of another size would have found: reuse distances of the blocks that traffic touched.

A block that is touched again is found by every cache that evicts the least recently used block and has room for it and
for the distinct blocks touched since. So one pass over the touches says what caches of all sizes would have found
(Mattson et al., "Evaluation techniques for storage hierarchies", IBM Systems Journal, 1970). A request finds the
leading run of its blocks: a block counts only where all before it are found.

Where there are too many touches, blocks are sampled by their identity, the rest is left out, and distances are scaled
(Waldspurger et al., "Efficient MRC construction with SHARDS", FAST 2015). Memory is bounded whatever the traffic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from quire.hashing import DIGEST_BYTES

TOUCH_LIMIT: Final = 2**18
_NEVER: Final = 2**40 - 1
"""More blocks than any pool has: of a block that was never touched before."""
_SAMPLE_SHIFT: Final = np.uint64(32)

Words = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]


class ReuseTrace:
    """Blocks in the order in which they were touched, and which of them a request asked for.

    Args:
        limit: touches that are kept; from there on every second block is left out, then three of four, ...

    Attributes:
        request_count: requests that asked.
        asked_block_count: blocks that they asked for.
    """

    def __init__(self, limit: int = TOUCH_LIMIT) -> None:
        self._limit = limit
        self._halvings = 0
        self._generation = 0
        self._words: list[Words] = []
        self._groups: list[Numbers] = []
        self._count = 0
        self.request_count = 0
        self.asked_block_count = 0

    @property
    def sampled_share(self) -> float:
        """Share of the blocks that are looked at."""
        return float(2.0**-self._halvings)

    def ask(self, identities: Sequence[bytes]) -> None:
        """Notes that a request asked for blocks, the beginning first, and touched them."""
        self.request_count += 1
        self.asked_block_count += len(identities)
        self._touch(identities, self.request_count)

    def touch(self, identities: Sequence[bytes]) -> None:
        """Notes that blocks were used, or let go of, in this order."""
        self._touch(identities, 0)

    def forget(self) -> None:
        """Notes that the cache was emptied: what was touched so far will not be found."""
        self._generation = (self._generation + 1) % 2**32

    def found(self, block_counts: Sequence[int]) -> tuple[list[float], float]:
        """Returns the share of the blocks asked for that caches of some sizes find, and that one of any size does."""
        if not self._count:
            return [0.0] * len(block_counts), 0.0
        needed = self._needed()
        if not len(needed):
            return [0.0] * len(block_counts), 0.0
        shares = [float(np.count_nonzero(needed <= count)) / len(needed) for count in block_counts]
        return shares, float(np.count_nonzero(needed < _NEVER)) / len(needed)

    def _touch(self, identities: Sequence[bytes], group: int) -> None:
        if not identities:
            return
        words = np.frombuffer(b"".join(identities), np.uint64).reshape(-1, DIGEST_BYTES // 8)[:, 0]
        # The other half of the word says who is sampled.
        words = words[self._is_sampled(words)] ^ np.uint64(self._generation)
        self._words.append(words)
        self._groups.append(np.full(len(words), group))
        self._count += len(words)
        while self._count > self._limit:
            self._halve()

    def _is_sampled(self, words: Words) -> npt.NDArray[np.bool_]:
        mask = np.uint64((1 << self._halvings) - 1)
        sampled: npt.NDArray[np.bool_] = ((words >> _SAMPLE_SHIFT) & mask) == 0
        return sampled

    def _halve(self) -> None:
        """Leaves out half of the blocks."""
        self._halvings += 1
        words, groups = np.concatenate(self._words), np.concatenate(self._groups)
        kept = self._is_sampled(words)
        self._words, self._groups, self._count = [words[kept]], [groups[kept]], int(np.count_nonzero(kept))

    def _needed(self) -> Numbers:
        """Returns, of each sampled block that was asked for, the blocks of the smallest cache that finds it."""
        words, groups = np.concatenate(self._words), np.concatenate(self._groups)
        order = np.argsort(words, kind="stable")
        again = words[order[1:]] == words[order[:-1]]
        before = np.full(len(words), -1)
        before[order[1:][again]] = order[:-1][again]
        # Distinct blocks since: touches between, less those of blocks that were touched between already.
        others = np.arange(len(words)) - before - 1 - earlier_greater(before)
        needed = np.where(before >= 0, (others << self._halvings) + 1, _NEVER)
        asked = groups > 0
        # The largest so far, request by request: each is lifted above all values of those before it.
        lift = groups[asked] * (_NEVER + 1)
        return np.maximum.accumulate(needed[asked] + lift) - lift


def earlier_greater(values: Numbers) -> Numbers:
    """Returns for each of `values` (-1 or more) how many before it are greater; O(n log n), a merge sort in columns."""
    size = 1 << max(1, (len(values) - 1).bit_length())
    current = np.full(size, -1)
    current[: len(values)] = values
    places, counts = np.arange(size), np.zeros(size, np.int64)
    span = int(current.max()) + 2
    width = 1
    while width < size:
        rows, at = current.reshape(-1, 2 * width), places.reshape(-1, 2 * width)
        # Halves are sorted; lifted row by row, all left halves together are sorted, too.
        lift = np.arange(len(rows))[:, None] * span
        left, right = (rows[:, :width] + lift).ravel(), (rows[:, width:] + lift).ravel()
        not_greater = (
            np.searchsorted(left, right, side="right").reshape(-1, width) - np.arange(len(rows))[:, None] * width
        )
        counts[at[:, width:]] += width - not_greater
        order = np.argsort(rows, axis=1, kind="stable")
        current, places = np.take_along_axis(rows, order, 1).ravel(), np.take_along_axis(at, order, 1).ravel()
        width *= 2
    return counts[: len(values)]
