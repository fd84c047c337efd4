"""How blocks are spent while preempted sequences wait.

What a preempted sequence gave up stays in the prefix cache until somebody takes it: each block that is taken then is
computed twice. What a sequence gave up at its end costs nothing. So, as long as somebody who was preempted waits, the
blocks of ended sequences are spent freely, and all others on a few sequences at a time: one of these ends after about
as many tokens as if all had gone on, and whoever waits finds more of its blocks again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from gateway.core.sequence import Sequence

SPARING: Final = 3
"""Sequences that may go on at the expense of who was preempted."""


class Shortage:
    """Who was preempted and waits, and what was returned since by sequences that ended."""

    __slots__ = ("_spare", "_waiting")

    def __init__(self) -> None:
        """Starts without a shortage."""
        self._waiting: set[Sequence] = set()
        self._spare = 0

    @property
    def lasts(self) -> bool:
        """Whether somebody who was preempted waits."""
        if self._waiting:
            self._waiting = {sequence for sequence in self._waiting if not sequence.ended}
        return bool(self._waiting)

    def preempted(self, sequence: Sequence) -> None:
        """A sequence gives way."""
        self._waiting.add(sequence)

    def returned(self, block_count: int) -> None:
        """A sequence has ended, and its blocks are back in the pool."""
        if self._waiting:
            self._spare += block_count

    def admitted(self, sequence: Sequence, block_count: int) -> None:
        """A sequence was admitted, with so many blocks that were not found in the cache.

        Who was preempted is ahead of who was not. So one that never was says that nobody waits any more.
        """
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        elif not sequence.preemption_count:
            self._waiting.clear()
        self._spare = max(0, self._spare - block_count) if self._waiting else 0

    def growth(self, computing: int) -> int:
        """Returns how many more sequences may grow in a step in which `computing` ones take part."""
        return max(self._spare, SPARING - computing)

    def grown(self, block_count: int) -> None:
        """Sequences took so many blocks."""
        self._spare = max(0, self._spare - block_count)
