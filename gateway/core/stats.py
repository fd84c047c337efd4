"""What a scheduler has done since its start."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(slots=True)
class SchedulerStats:
    """Counters since the start, in tokens and steps."""

    step_count: int = 0
    scheduled_token_count: int = 0
    preemption_count: int = 0
    stalled_count: int = 0
    """Times a sequence sat a step out for want of a block."""
