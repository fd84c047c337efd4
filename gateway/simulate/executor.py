"""An executor that computes nothing: it knows how far each sequence is and when its output ends."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gateway.core.sequence import Sequence
from gateway.core.step import StepDraft, StepOutcome
from gateway.simulate.workload import Lengths


class FakeExecutor:
    """Answers each step at once, as a device would: what was written, sampled, fenced.

    Args:
        request_count: requests of the workload, numbered from 0.
        output_token: returns the token that a request generates at a position.

    Attributes:
        written: `[request]` tokens of its current table whose keys and values exist.
        known: `[request]` tokens there are.
        frontier: `[request]` most tokens that were ever computed; what is computed below it is computed twice.
    """

    def __init__(self, request_count: int, output_token: Callable[[int, int], int]) -> None:
        self.written: Lengths = np.zeros(request_count, np.int64)
        self.known: Lengths = np.zeros(request_count, np.int64)
        self.frontier: Lengths = np.zeros(request_count, np.int64)
        self._output_token = output_token
        self._requests: dict[int, int] = {}
        self.computed_tokens = 0
        self.recomputed_tokens = 0

    def add(self, sequence: Sequence, request: int) -> None:
        """Takes in a table that was admitted."""
        self._requests[sequence.table] = request
        self.written[request] = sequence.begun_at
        self.known[request] = len(sequence.tokens)

    def run(self, draft: StepDraft) -> StepOutcome:
        """Runs a step."""
        tables = draft.scheduled_tables
        if not tables:
            self._drop(draft.removed)
            return StepOutcome([], [], [], [], list(draft.removed), [])
        requests = np.array([self._requests[table] for table in tables])
        counts = np.array(draft.scheduled_counts)
        before = self.written[requests]
        after = before + counts
        self.written[requests] = after
        frontier = self.frontier[requests]
        self.recomputed_tokens += int((np.minimum(after, frontier) - before).clip(0).sum())
        self.computed_tokens += int(counts.sum())
        self.frontier[requests] = np.maximum(after, frontier)
        sampled = np.flatnonzero(after == self.known[requests])
        at = requests[sampled]
        positions = self.known[at]
        self.known[at] = positions + 1
        tokens = [self._output_token(*pair) for pair in zip(at.tolist(), positions.tolist(), strict=True)]
        self._drop(draft.removed)
        return StepOutcome(
            tables, after.tolist(), [tables[row] for row in sampled.tolist()], tokens, list(draft.removed), []
        )

    def _drop(self, tables: list[int]) -> None:
        for table in tables:
            self._requests.pop(table, None)
