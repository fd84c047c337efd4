"""Who goes before whom: in the queue, in a step, and when blocks are short.

`fcfs` serves in order of arrival; of those that run, who was admitted first goes first. `priority` puts the request's
priority before that: a lower number goes first, as vLLM has it, and equal ones in order of arrival. With ageing a
request gains a step of priority for each so many seconds of its age: two requests keep their order, whenever one looks,
and no stream of urgent ones can keep another waiting for more than the steps between them. `fair` admits whoever's
tenant has been served least (`gateway.core.fairness`); of those that run it is as `fcfs`.
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
    FAIR = "fair"


Place: TypeAlias = tuple[float | str, ...]
"""Lower goes first. Places of one policy and one function can be compared."""


def place_in_queue(sequence: Sequence, policy: SchedulingPolicy) -> Place:
    """Returns the place of a sequence that waits; it is the same whenever the sequence comes back to the queue.

    Under `fcfs` by arrival in the queue, and so under `fair` within one tenant; under `priority` by aged priority, time
    of arrival and request id; samples of one request follow each other.
    """
    request = sequence.request
    if policy is not SchedulingPolicy.PRIORITY:
        return (request.arrival_no, sequence.index)
    return (request.aged_priority, request.arrived_at, request.settings.request_id, sequence.index)


def place_in_step(sequence: Sequence, policy: SchedulingPolicy) -> Place:
    """Returns the place of a sequence that runs: the first gets tokens and blocks first, the last gives way first.

    Under `fcfs` and `fair` by admission, under `priority` by aged priority, then time of arrival, then admission.
    """
    if policy is not SchedulingPolicy.PRIORITY:
        return (sequence.admission_no,)
    request = sequence.request
    return (request.aged_priority, request.arrived_at, sequence.admission_no)
