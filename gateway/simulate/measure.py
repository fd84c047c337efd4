"""What a simulation measures: slots of the pool by what they hold, step by step, and sums over the run."""

from __future__ import annotations

from array import array
import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclasses.dataclass(frozen=True, slots=True)
class Slots:
    """The slots of a pool after a step; together they are all of it.

    Attributes:
        useful: hold the keys and values of a token of a running sequence; a shared token counts once.
        reserved: blocks kept for tokens that their sequence will generate later, or is about to compute.
        internal: held, and never to be used, or empty in a block that is partly filled.
        external: nobody's: free, in a lease, cached for later, waiting for a fence, or of no use in their shape.
    """

    useful: int
    reserved: int
    internal: int
    external: int


class Recorder:
    """Collects samples; a sample is saturated when a request waited for admission after it."""

    def __init__(self, slot_count: int) -> None:
        """Starts empty, for a pool of so many slots."""
        self.slot_count = slot_count
        self._columns = [array("q") for _ in range(5)]
        self._saturated = array("b")

    def add(self, slots: Slots, computing: int, *, saturated: bool) -> None:
        """Takes a sample; `computing` sequences had a token computed in the step."""
        row = (slots.useful, slots.reserved, slots.internal, slots.external, computing)
        for column, value in zip(self._columns, row, strict=True):
            column.append(value)
        self._saturated.append(saturated)

    def __len__(self) -> int:
        return len(self._saturated)

    def columns(self) -> npt.NDArray[np.int64]:
        """Returns `[kind, step]`: useful, reserved, internal, external slots, and sequences computing."""
        return np.array([np.frombuffer(column, np.int64) for column in self._columns]).reshape(5, -1)

    def means(self) -> tuple[list[float], bool]:
        """Returns the mean of each column over the saturated steps, slots as shares of the pool.

        If no step was saturated, the means are over all steps and the second value is False.
        """
        samples = self.columns()
        chosen = np.frombuffer(self._saturated, np.int8).astype(bool)
        saturated = bool(chosen.any())
        if saturated:
            samples = samples[:, chosen]
        if not samples.shape[1]:
            return [0.0] * 5, False
        means: list[float] = samples.mean(axis=1).tolist()
        return [value / self.slot_count for value in means[:4]] + means[4:], saturated


@dataclasses.dataclass(slots=True)
class Counters:
    """Sums over a run; tokens, requests and events."""

    computed_tokens: int = 0
    """All that the executor computed."""
    recomputed_tokens: int = 0
    """Of these, computed before and lost to a preemption."""
    swapped_blocks: int = 0
    """Moved to host memory and back, each way counted."""
    finished_count: int = 0
    finished_prompt_tokens: int = 0
    finished_output_tokens: int = 0
    rejected_count: int = 0
    """Longer than the model allows, or than the whole pool."""
    truncated_count: int = 0
    """Ended at `max_model_len` with more to say."""
    query_tokens: int = 0
    hit_tokens: int = 0
    """Of `query_tokens`, those of prompts that were found in the cache at first admission."""


@dataclasses.dataclass(frozen=True, slots=True)
class PolicyResult:
    """What came of one policy."""

    policy: str
    counters: Counters
    recorder: Recorder
    steps: int
    preemptions: int
    stalls: int
    elapsed_seconds: float

    def document(self) -> dict[str, Any]:
        """Returns the figures as JSON has them; shares are of 1."""
        (useful, reserved, internal, external, computing), saturated = self.recorder.means()
        counts = self.counters
        steps = max(1, self.steps)
        return {
            "utilization": useful,
            "recompute_tax": counts.recomputed_tokens / max(1, counts.computed_tokens),
            "mean_concurrency": computing,
            "goodput_tokens_per_step": counts.finished_output_tokens / steps,
            "rejected_count": counts.rejected_count,
            "prefix_hit_rate": counts.hit_tokens / max(1, counts.query_tokens),
            "internal_waste": internal,
            "external_waste": external,
            "reservation_waste": reserved,
            "steps": self.steps,
            "preemptions": self.preemptions,
            "stalls": self.stalls,
            "swapped_blocks": counts.swapped_blocks,
            "finished_count": counts.finished_count,
            "truncated_count": counts.truncated_count,
            "computed_tokens": counts.computed_tokens,
            "recomputed_tokens": counts.recomputed_tokens,
            "finished_prompt_tokens": counts.finished_prompt_tokens,
            "finished_output_tokens": counts.finished_output_tokens,
            "saturated": saturated,
            "elapsed_seconds": self.elapsed_seconds,
        }
