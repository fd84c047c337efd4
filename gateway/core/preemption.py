"""Who gives way when the pool is short."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from gateway.core.precedence import SchedulingPolicy, place_in_queue, place_in_step
from quire.units import div_ceil

if TYPE_CHECKING:
    from gateway.core.sequence import Sequence


def loss_per_block(sequence: Sequence, block_size: int) -> int:
    """Returns the tokens that a preemption has computed again for each block that it gains, rounded up.

    What was found in the cache at admission is neither: others may hold it, and it is likely to be found again.
    """
    gained = len(sequence.blocks) - sequence.cached_token_count // block_size
    lost = max(0, sequence.scheduled - sequence.cached_token_count)
    return div_ceil(lost, gained) if gained else block_size + 1


def choose_victim(
    running: Iterable[Sequence],
    max_preemptions: int,
    policy: SchedulingPolicy = SchedulingPolicy.FCFS,
    block_size: int = 16,
) -> Sequence | None:
    """Returns the sequence to preempt: never the first in precedence, and nobody too often while there is another.

    First come, first served: the one that loses fewest tokens for a block gained; of those that lose as many, the
    latest admitted. Under priorities: the lowest, and of those the latest. The first goes on whatever it costs, so a
    pool that holds one sequence finishes every request in turn.

    Args:
        running: who may give way.
        max_preemptions: preemptions after which a sequence is spared while there is another one.
        policy: what decides who is last.
        block_size: tokens in a block.
    """
    places = {sequence: place_in_step(sequence, policy) for sequence in running}
    if not places:
        return None
    first = min(places.values())
    by_loss = policy is not SchedulingPolicy.PRIORITY
    return max(
        (sequence for sequence, place in places.items() if place != first),
        key=lambda sequence: (
            sequence.preemption_count < max_preemptions,
            -loss_per_block(sequence, block_size) if by_loss else 0,
            places[sequence],
        ),
        default=None,
    )


def last_held(running: Iterable[Sequence], policy: SchedulingPolicy) -> Sequence | None:
    """Returns the one of those that are held that has the last place in the queue; None if nobody is held.

    A beam is held until the others of its search have come as far, which may be the ones that wait for its blocks. It
    is not queued again before it may go on: so the first in the queue is admitted in the end, whatever it needs.
    """
    held = (sequence for sequence in running if sequence.held)
    return max(held, key=lambda sequence: place_in_queue(sequence, policy), default=None)
