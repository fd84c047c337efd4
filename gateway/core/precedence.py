"""Who goes before whom: in the queue, in a step, and when blocks are short.

`fcfs` serves in order of arrival; of those that run, who was admitted first goes first. `priority` puts the request's
priority before that: a lower number goes first, as vLLM has it, and equal ones in order of arrival.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from gateway.core.sequence import Sequence


class SchedulingPolicy(enum.Enum):
    """What decides who goes first."""

    FCFS = "fcfs"
    PRIORITY = "priority"


Place: TypeAlias = tuple[float | str, ...]
"""Lower goes first. Places of one policy and one function can be compared."""


def place_in_queue(sequence: Sequence, policy: SchedulingPolicy) -> Place:
    """Returns the place of a sequence that waits; it is the same whenever the sequence comes back to the queue.

    Under `fcfs` by arrival in the queue, under `priority` by priority, time of arrival and request id; samples of one
    request follow each other.
    """
    request = sequence.request
    if policy is SchedulingPolicy.FCFS:
        return (request.arrival_no, sequence.index)
    settings = request.settings
    return (settings.priority, request.arrived_at, settings.request_id, sequence.index)


def place_in_step(sequence: Sequence, policy: SchedulingPolicy) -> Place:
    """Returns the place of a sequence that runs: the first gets tokens and blocks first, the last gives way first.

    Under `fcfs` by admission, under `priority` by priority, then time of arrival, then admission.
    """
    if policy is SchedulingPolicy.FCFS:
        return (sequence.admission_no,)
    request = sequence.request
    return (request.settings.priority, request.arrived_at, sequence.admission_no)
