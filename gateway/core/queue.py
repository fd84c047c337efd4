"""The waiting line of one model: first come, first served; who was preempted goes back to the head."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from gateway.core.sequence import Sequence, SequenceState
from quire.errors import AdmissionError

if TYPE_CHECKING:
    from gateway.core.request import Request

_RETRY_SECONDS = 1.0


class WaitingQueue:
    """Sequences that wait for admission. Bounded in requests; what was admitted once always finds room again."""

    def __init__(self, max_size: int) -> None:
        """Makes an empty queue for at most `max_size` requests."""
        self._max_size = max_size
        self._waiting: OrderedDict[Sequence, None] = OrderedDict()
        self._new: set[Sequence] = set()

    def __len__(self) -> int:
        """Sequences that wait."""
        return len(self._waiting)

    def push_request(self, request: Request) -> None:
        """Appends the first sample of a new request; the others follow when its prompt is computed.

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
        request.samples[0].state = SequenceState.WAITING
        self._waiting[request.samples[0]] = None
        self._new.add(request.samples[0])

    def push_front(self, sequences: list[Sequence]) -> None:
        """Puts sequences at the head, in their order: preempted ones, and further samples of an admitted request."""
        for sequence in reversed(sequences):
            self._waiting[sequence] = None
            self._waiting.move_to_end(sequence, last=False)

    def pop(self) -> Sequence | None:
        """Takes the head, or None."""
        if not self._waiting:
            return None
        sequence, _ = self._waiting.popitem(last=False)
        self._new.discard(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> bool:
        """Takes a sequence out of the middle; returns whether it was there."""
        self._new.discard(sequence)
        return self._waiting.pop(sequence, self) is None
