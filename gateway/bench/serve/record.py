"""What the client of one request saw."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(slots=True)
class Record:
    """One request, as its client saw it. Times in seconds since the load began."""

    index: int
    prompt_token_count: int
    sent_at: float
    ended_at: float = 0.0
    failure: str = ""
    """Reason of its error; empty for a request that was answered to its end."""
    token_times: list[float] = dataclasses.field(default_factory=list)
    """Arrival of each message with tokens."""
    token_count: int = 0
    cached_token_count: int = 0
    recomputed_token_count: int = 0
    preemption_count: int = 0
    swap_count: int = 0
    queue_seconds: float | None = None
    """Time in the server's queue, if the server tells."""

    @property
    def seconds(self) -> float:
        """From sending to the end."""
        return self.ended_at - self.sent_at

    @property
    def first_token_seconds(self) -> float | None:
        """From sending to the first token, if there was one."""
        return self.token_times[0] - self.sent_at if self.token_times else None

    @property
    def seconds_per_token(self) -> float | None:
        """Mean time of a token after the first, if there were several."""
        if self.token_count < 2:  # noqa: PLR2004 - a first one and another
            return None
        return (self.token_times[-1] - self.token_times[0]) / (self.token_count - 1)

    @property
    def computed_token_count(self) -> int:
        """Tokens that the server computed for it."""
        decoded = max(0, self.token_count - 1)
        return self.prompt_token_count - self.cached_token_count + decoded + self.recomputed_token_count
