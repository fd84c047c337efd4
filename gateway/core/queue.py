"""The waiting line of one model: every sequence has its place in it, and takes that again when it comes back."""

from __future__ import annotations

from collections.abc import Collection
import heapq
import itertools
from typing import TYPE_CHECKING, TypeAlias

from gateway.core.fairness import OUTPUT_WEIGHT, PROMPT_WEIGHT, FairShares
from gateway.core.precedence import Place, SchedulingPolicy, place_in_queue
from gateway.core.sequence import Sequence, SequenceState
from quire.errors import AdmissionError

if TYPE_CHECKING:
    from gateway.core.request import Request

_RETRY_SECONDS = 1.0
_SLACK = 64
"""Entries without a sequence that a heap may have, besides as many as have one."""


_Entry: TypeAlias = tuple[Place, int, Sequence]


class WaitingQueue:
    """Sequences that wait for admission. Bounded in requests; what was admitted once always finds room again.

    Args:
        max_size: most requests that wait and were never admitted.
        policy: what decides who is first.
    """

    def __init__(self, max_size: int, policy: SchedulingPolicy = SchedulingPolicy.FCFS) -> None:
        self.policy = policy
        self._max_size = max_size
        # By tenant where shares are fair, one for all elsewhere. Entries of sequences that were removed, or entered
        # anew, stay until they come up.
        self._heaps: dict[str | None, list[_Entry]] = {}
        self._shares = FairShares() if policy is SchedulingPolicy.FAIR else None
        self._waiting: dict[Sequence, int] = {}
        self._new: set[Sequence] = set()
        self._parked: set[Sequence] = set()
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
        self.check_room()
        request.arrival_no = next(self._arrivals)
        if self._shares is not None:
            self._shares.arrived(request.settings.tenant, [tenant for tenant in self._heaps if tenant is not None])
        request.samples[0].state = SequenceState.WAITING
        self._enter(request.samples[0])
        self._new.add(request.samples[0])

    @property
    def is_full(self) -> bool:
        """Whether a new request finds no room."""
        return len(self._new) >= self._max_size

    def check_room(self) -> None:
        """Raises AdmissionError if the queue is full."""
        if self.is_full:
            message = (
                f"the queue is full: {len(self._new)} requests wait, allowed are {self._max_size}; try again later"
            )
            raise AdmissionError(
                message,
                metadata={"queue_depth": len(self._new), "max_queue_size": self._max_size},
                retry_after=_RETRY_SECONDS,
            )

    def put_back(self, sequences: list[Sequence]) -> None:
        """Enters preempted sequences, refused ones, and further samples of an admitted request, at their places.

        All that was admitted before has its place ahead of what has not been, unless priorities say otherwise. Who is
        held would only keep blocks from others: it takes its place when it is resumed.
        """
        for sequence in sequences:
            if sequence.held:
                self._parked.add(sequence)
            else:
                self._enter(sequence)

    def resumed(self, sequence: Sequence) -> None:
        """A sequence may go on: if it was put back while it was held, it takes its place now."""
        if sequence in self._parked:
            self._parked.remove(sequence)
            self._enter(sequence)

    def admitted(self, sequence: Sequence, cached_token_count: int) -> None:
        """A sequence has left the queue for good or until it gives way; its prompt is on its tenant's account."""
        if self._shares is not None and not sequence.preemption_count:
            computed = len(sequence.tokens) - cached_token_count
            self._shares.charge(sequence.request.settings.tenant, PROMPT_WEIGHT * computed)
            self._shares.left(sequence.request.settings.tenant)

    def served(self, sequence: Sequence) -> None:
        """A sequence has more tokens than when this was called last; they are on its tenant's account."""
        if self._shares is not None:
            new = sequence.completion_length - sequence.charged_token_count
            sequence.charged_token_count += new
            self._shares.charge(sequence.request.settings.tenant, OUTPUT_WEIGHT * new)

    def _enter(self, sequence: Sequence) -> None:
        self._waiting[sequence] = entry = next(self._entries)
        item = (place_in_queue(sequence, self.policy), entry, sequence)
        heapq.heappush(self._heaps.setdefault(self._heap_of(sequence), []), item)

    def _heap_of(self, sequence: Sequence) -> str | None:
        """Returns the heap of a sequence: None for the one that is ahead of the tenants', or of all."""
        if self._shares is None or sequence.preemption_count or sequence.index:
            return None
        return sequence.request.settings.tenant

    def pop(self, passed_over: Collection[str] = (), pool_id: str = "") -> Sequence | None:
        """Takes the first sequence whose tenant is not one of `passed_over`, or None.

        Who has content in the host memory of another executor than that of `pool_id` is left to that one.
        """
        heaps: list[str | None] = [None] if None in self._heaps else []
        if self._shares is not None:
            heaps += self._shares.order([name for name in self._heaps if name is not None and name not in passed_over])
        for name in heaps:
            found = self._pop_from(self._heaps[name], passed_over, pool_id)
            if not self._heaps[name]:
                del self._heaps[name]
            if found is not None:
                del self._waiting[found]
                self._new.discard(found)
                return found
        return None

    def _pop_from(self, heap: list[_Entry], passed_over: Collection[str], pool_id: str) -> Sequence | None:
        """Takes the first sequence of one heap that may be taken, see `pop`, or None."""
        waiting: list[_Entry] = []
        found: Sequence | None = None
        while heap and found is None:
            item = heapq.heappop(heap)
            _, entry, sequence = item
            if self._waiting.get(sequence) != entry:
                continue
            bound = sequence.swapped is not None and sequence.swapped.pool_id != pool_id
            if bound or sequence.request.settings.tenant in passed_over:
                waiting.append(item)
                continue
            found = sequence
        for item in waiting:
            heapq.heappush(heap, item)
        return found

    def remove(self, sequence: Sequence) -> bool:
        """Takes a sequence out of the middle; returns whether it was there."""
        if sequence in self._parked:
            self._parked.remove(sequence)
            return True
        self._new.discard(sequence)
        if self._waiting.pop(sequence, None) is None:
            return False
        if sum(map(len, self._heaps.values())) > _SLACK + 2 * len(self._waiting):
            self._heaps = {name: self._alive(heap) for name, heap in self._heaps.items()}
            self._heaps = {name: heap for name, heap in self._heaps.items() if heap}
        return True

    def _alive(self, heap: list[_Entry]) -> list[_Entry]:
        """Returns a heap of those entries whose sequences wait."""
        alive = [item for item in heap if self._waiting.get(item[2]) == item[1]]
        heapq.heapify(alive)
        return alive
