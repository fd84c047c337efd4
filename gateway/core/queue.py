"""The waiting line of one model: every sequence has its place in it, and takes that again when it comes back."""

from __future__ import annotations

from collections.abc import Collection
import heapq
import itertools
from typing import TYPE_CHECKING

from gateway.core.precedence import Place, SchedulingPolicy, place_in_queue
from gateway.core.sequence import Sequence, SequenceState
from quire.errors import AdmissionError

if TYPE_CHECKING:
    from gateway.core.request import Request

_RETRY_SECONDS = 1.0
_SLACK = 64
"""Entries without a sequence that a heap may have, besides as many as have one."""


class WaitingQueue:
    """Sequences that wait for admission. Bounded in requests; what was admitted once always finds room again.

    Args:
        max_size: most requests that wait and were never admitted.
        policy: what decides who is first.
    """

    def __init__(self, max_size: int, policy: SchedulingPolicy = SchedulingPolicy.FCFS) -> None:
        self.policy = policy
        self._max_size = max_size
        # A heap; entries of sequences that were removed, or entered anew, stay until they come up.
        self._heap: list[tuple[Place, int, Sequence]] = []
        self._waiting: dict[Sequence, int] = {}
        self._new: set[Sequence] = set()
        self._arrivals = itertools.count(1)
        self._entries = itertools.count(1)

    def __len__(self) -> int:
        """Sequences that wait."""
        return len(self._waiting)

    def push_request(self, request: Request) -> None:
        """Enters the first sample of a new request; the others follow when its prompt is computed.

        Raises:
            AdmissionError: the queue is full.
        """
        if len(self._new) >= self._max_size:
            message = (
                f"the queue is full: {len(self._new)} requests wait, allowed are {self._max_size}; try again later"
            )
            raise AdmissionError(
                message,
                metadata={"queue_depth": len(self._new), "max_queue_size": self._max_size},
                retry_after=_RETRY_SECONDS,
            )
        request.arrival_no = next(self._arrivals)
        request.samples[0].state = SequenceState.WAITING
        self._enter(request.samples[0])
        self._new.add(request.samples[0])

    def put_back(self, sequences: list[Sequence]) -> None:
        """Enters preempted sequences, refused ones, and further samples of an admitted request, at their places.

        All that was admitted before has its place ahead of what has not been, unless priorities say otherwise.
        """
        for sequence in sequences:
            self._enter(sequence)

    def _enter(self, sequence: Sequence) -> None:
        self._waiting[sequence] = entry = next(self._entries)
        heapq.heappush(self._heap, (place_in_queue(sequence, self.policy), entry, sequence))

    def pop(self, passed_over: Collection[str] = ()) -> Sequence | None:
        """Takes the first sequence whose tenant is not one of `passed_over`, or None."""
        waiting: list[tuple[Place, int, Sequence]] = []
        found: Sequence | None = None
        while self._heap and found is None:
            item = heapq.heappop(self._heap)
            _, entry, sequence = item
            if self._waiting.get(sequence) != entry:
                continue
            if sequence.request.settings.tenant in passed_over:
                waiting.append(item)
                continue
            found = sequence
            del self._waiting[sequence]
            self._new.discard(sequence)
        for item in waiting:
            heapq.heappush(self._heap, item)
        return found

    def remove(self, sequence: Sequence) -> bool:
        """Takes a sequence out of the middle; returns whether it was there."""
        self._new.discard(sequence)
        if self._waiting.pop(sequence, None) is None:
            return False
        if len(self._heap) > _SLACK + 2 * len(self._waiting):
            self._heap = [item for item in self._heap if self._waiting.get(item[2]) == item[1]]
            heapq.heapify(self._heap)
        return True
