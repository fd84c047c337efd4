"""How long blocks stay and what they are good for meanwhile: the lives of some of them, sampled.

    taken --> accessed (the last four times are kept) --> released --> content gone: one record

Every n-th block that is taken is followed; which ones depends on nothing but their count. This is told about a pool and
no part of its state: no command depends on it, and a replay does without.
"""

from __future__ import annotations

from collections import deque
import dataclasses
import itertools
from typing import Final

import numpy as np
import numpy.typing as npt

from memsvc.core.free_order import BlockIds

ACCESS_LIMIT: Final = 4
RECORD_LIMIT: Final = 4096


@dataclasses.dataclass(slots=True)
class Residency:
    """One life of a block; times are those of the caller's clock, in seconds.

    Attributes:
        block_id: the block.
        born: when it was taken, for a table or as part of a lease.
        accesses: when another table came to name it, or to copy from it: the last ACCESS_LIMIT times.
        released: when its last reference was dropped, the last time.
        ended: when its content was given up.
        number: 1, 2, 3, ... in the order in which lives ended.
    """

    block_id: int
    born: float
    accesses: deque[float]
    released: float = 0.0
    ended: float = 0.0
    number: int = 0

    @property
    def lifetime(self) -> float:
        """Seconds from birth to end."""
        return self.ended - self.born

    @property
    def idle(self) -> float:
        """Seconds of these, at the end, in which nobody used it."""
        return self.ended - self.released


class ResidencySampler:
    """Follows every `every`-th block that is taken.

    A pool calls it for all its blocks; it looks only at those that it follows, in a few vector operations.

    Args:
        block_count: blocks of the pool, the null block included.
        every: 1 for all.

    Attributes:
        followed: `[block]` whether this life of the block is followed.
        lives: the lives that are followed, by block.
    """

    __slots__ = ("_count", "_every", "_records", "_taken", "followed", "lives")

    def __init__(self, block_count: int, every: int) -> None:
        self._every = every
        self._taken = 0
        self._count = 0
        self._records: deque[Residency] = deque(maxlen=RECORD_LIMIT)
        self.followed = np.zeros(block_count, np.bool_)
        self.lives: dict[int, Residency] = {}

    def records(self, after: int = 0, limit: int = RECORD_LIMIT) -> list[Residency]:
        """Returns at most `limit` lives that ended after that of number `after`; the RECORD_LIMIT newest are kept."""
        start = max(0, after - (self._count - len(self._records)))
        return list(itertools.islice(self._records, start, start + limit))

    def clear(self) -> None:
        """Forgets every life."""
        self.followed[:] = False
        self.lives.clear()
        self._records.clear()

    def taken(self, blocks: BlockIds, now: float) -> None:
        """Notes that blocks are taken for new content; what they held is gone."""
        self.ended(blocks, now)
        chosen = blocks[(-self._taken) % self._every :: self._every]
        self._taken += len(blocks)
        self.followed[chosen] = True
        for block in chosen.tolist():
            self.lives[block] = Residency(block, now, deque(maxlen=ACCESS_LIMIT))

    def accessed(self, blocks: BlockIds, now: float) -> None:
        """Notes that blocks were found."""
        for block in self._among(blocks):
            self.lives[block].accesses.append(now)

    def released(self, blocks: BlockIds, reusable: npt.NDArray[np.bool_], now: float) -> None:
        """Notes that nobody names blocks any more; those that cannot be matched have come to their end."""
        for block in self._among(blocks):
            self.lives[block].released = now
        self.ended(blocks[~reusable], now)

    def ended(self, blocks: BlockIds, now: float) -> None:
        """Notes that what blocks held is given up."""
        for block in self._among(blocks):
            life = self.lives.pop(block)
            self._count += 1
            life.number, life.ended = self._count, now
            self._records.append(life)
        self.followed[blocks] = False

    def returned(self, blocks: BlockIds) -> None:
        """Forgets leased blocks that were never used."""
        for block in self._among(blocks):
            del self.lives[block]
        self.followed[blocks] = False

    def _among(self, blocks: BlockIds) -> list[int]:
        """Returns those of `blocks` that are followed."""
        found: list[int] = blocks[self.followed[blocks]].tolist()
        return found
