"""Who gives way when the pool is short."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from gateway.core.precedence import SchedulingPolicy, place_in_step

if TYPE_CHECKING:
    from gateway.core.sequence import Sequence


def choose_victim(
    running: Iterable[Sequence], max_preemptions: int, policy: SchedulingPolicy = SchedulingPolicy.FCFS
) -> Sequence | None:
    """Returns the sequence to preempt: the last in precedence that was not preempted too often already.

    First come, first served: the earliest admitted sequence always goes on, so a pool that holds one sequence finishes
    every request in turn. If all were preempted `max_preemptions` times or more, the last of them gives way.

    Args:
        running: who may give way.
        max_preemptions: preemptions after which a sequence is spared while there is another one.
        policy: what decides who is last.
    """
    return max(
        running,
        key=lambda sequence: (sequence.preemption_count < max_preemptions, place_in_step(sequence, policy)),
        default=None,
    )
