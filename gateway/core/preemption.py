"""Who gives way when the pool is short."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.core.sequence import Sequence


def choose_victim(running: Iterable[Sequence], max_preemptions: int) -> Sequence | None:
    """Returns the sequence to preempt: the latest admitted one that was not preempted too often already.

    First come, first served: the earliest admitted sequence always goes on, so a pool that holds one sequence finishes
    every request in turn. If all were preempted `max_preemptions` times or more, the latest of them gives way.
    """
    latest = None
    latest_spared = None
    for sequence in running:
        if sequence.preemption_count < max_preemptions:
            if latest is None or sequence.admission_no > latest.admission_no:
                latest = sequence
        elif latest_spared is None or sequence.admission_no > latest_spared.admission_no:
            latest_spared = sequence
    return latest or latest_spared
