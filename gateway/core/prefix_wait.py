"""Sequences that wait until another one has computed the beginning of their prompt.

Of two equal prompts that come at once the second computes and holds only its rest if it waits for the first. It would
not be faster by itself: the first one's prompt is ahead of it in every step. Others may be admitted meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.core.sequence import Sequence

PATIENCE_SECONDS = 2.0
"""A sequence waits no longer in all: the one that computes may be held up for a reason of its own."""
WAITING_LIMIT = 64
"""So many wait at most: the queue, which they have left, is bounded, and this is beside it."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Wait:
    """What one sequence waits for."""

    sequence: Sequence
    table: int
    token_count: int


class PrefixWait:
    """Those who wait. The queue hears of them again by `take`, which also the caller's timer calls."""

    def __init__(self) -> None:
        """Starts with nobody waiting."""
        self._waits: list[_Wait] = []
        self._until: dict[Sequence, float] = {}

    def __bool__(self) -> bool:
        """Whether anybody waits."""
        return bool(self._waits)

    def may_wait(self, sequence: Sequence, now: float) -> bool:
        """Whether a sequence may wait (again), at `now` seconds."""
        return len(self._waits) < WAITING_LIMIT and now < self._until.get(sequence, now + 1.0)

    def add(self, sequence: Sequence, table: int, token_count: int, now: float) -> None:
        """Has a sequence wait until `table` has `token_count` tokens computed."""
        if len(self._until) > 2 * WAITING_LIMIT:
            # Some of them were cancelled while they were in the queue.
            self._until = {known: until for known, until in self._until.items() if until > now}
        self._until.setdefault(sequence, now + PATIENCE_SECONDS)
        self._waits.append(_Wait(sequence, table, token_count))

    def take(self, computed: Mapping[int, int] | None = None) -> list[Sequence]:
        """Removes and returns those who need not wait any more, in the order in which they came.

        Args:
            computed: tokens computed of each table that may be waited for; who waits for another one goes on waiting,
                for the caller's timer. None for everybody.
        """
        if computed is None:
            done, self._waits = self._waits, []
        else:
            done = [wait for wait in self._waits if computed.get(wait.table, -1) >= wait.token_count]
            if done:
                self._waits = [wait for wait in self._waits if wait not in done]
        for wait in done:
            if wait.sequence.ended:
                self.forget(wait.sequence)
        return [wait.sequence for wait in done]

    def forget(self, sequence: Sequence) -> None:
        """Forgets how long a sequence has waited: it is admitted, or has ended."""
        self._until.pop(sequence, None)
