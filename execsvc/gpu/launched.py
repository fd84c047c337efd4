"""A step on its way: what comes back of it, and what the words mean that come back."""

from __future__ import annotations

import dataclasses
import time
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from execsvc.batch import Arrangement
from execsvc.choosing import LogprobRows, Siblings
from execsvc.gpu.staging import Returned, Words
from execsvc.sequences import Sequence, SequenceRows
from kernels.sampling.tensors import REPORT_WORDS, REPORTED

Ints = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True)
class Reports:
    """What the reports of a step are about, a row each, in the order in which they are answered."""

    places: Ints
    """`[row]`: which report of those that come back."""
    tables: Ints
    positions: Ints
    counts: Ints
    """`[row]`: most likely tokens reported besides."""
    tokens: Ints
    """`[row]`: the token, or where it is unknown yet, -1 minus its place among the words that come back."""

    @classmethod
    def joined(cls, parts: list[Reports]) -> Reports:
        """Returns all rows of the parts."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def ordered(self, order: Ints) -> Reports:
        """Returns the rows in another order."""
        return Reports(*(getattr(self, field.name)[order] for field in dataclasses.fields(self)))

    @classmethod
    def of_samples(cls, rows: SequenceRows, samplers: list[Sequence], row_ids: Ints) -> Reports | None:
        """Returns what is reported of the tokens that a step samples, None for nothing."""
        counts = rows.logprobs[row_ids]
        places = np.flatnonzero(counts >= 0)
        if not len(places):
            return None
        tables = np.array([samplers[place].table for place in places.tolist()], dtype=np.int64)
        return cls(places, tables, rows.known[row_ids[places]], counts[places], -1 - places)

    @classmethod
    def of_prompts(cls, plan: Arrangement, first: int) -> Reports:
        """Returns what is reported of the prompts in a step; theirs come back from place `first` on."""
        sequences = [plan.sequences[index] for index, _ in plan.reported]
        following = [position + 1 for _, position in plan.reported]
        columns = [
            [sequence.table for sequence in sequences],
            following,
            [sequence.sampling.prompt_logprobs for sequence in sequences],
            [sequence.tokens[position] for sequence, position in zip(sequences, following, strict=True)],
        ]
        tables, positions, counts, tokens = (np.array(column, dtype=np.int64) for column in columns)
        return cls(first + np.arange(len(sequences)), tables, positions, counts, tokens)

    def read(self, tokens: Words, reports: Words) -> LogprobRows:
        """Returns the rows of tokens that were chosen.

        Args:
            tokens: words that came back, tokens first.
            reports: `[report, REPORT_WORDS]`.
        """
        about = np.where(self.tokens < 0, tokens[np.maximum(-1 - self.tokens, 0)], self.tokens)
        chosen = about >= 0
        words = reports[self.places[chosen]]
        values = words.view(np.float32)
        listed = np.concatenate([about[chosen, None], words[:, 2 : 2 + REPORTED]], 1)
        # Where the vocabulary has no more, tokens are -1.
        used = (np.arange(1 + REPORTED) <= self.counts[chosen, None]) & (listed >= 0)
        logarithms = np.concatenate([values[:, 1:2], values[:, 2 + REPORTED :]], 1)
        return LogprobRows(
            tables=self.tables[chosen].tolist(),
            positions=self.positions[chosen].tolist(),
            ranks=words[:, 0].tolist(),
            counts=used.sum(1).tolist(),
            token_ids=listed[used].tolist(),
            values=logarithms[used].tolist(),
        )


@dataclasses.dataclass(slots=True)
class Launched:
    """A step that is on its way. Implements `execsvc.steps.LaunchedStep`."""

    deferred: ClassVar[bool] = True
    sequences: list[Sequence]
    lens: list[int]
    sampled: list[int]
    returned: Returned
    clock: Clock
    started_ns: int
    sibling_places: list[int] = dataclasses.field(default_factory=list)
    """Place among those that sample of each sibling's token."""
    reports: Reports | None = None
    model_ns: int = 0
    siblings: Siblings = dataclasses.field(default_factory=dict)
    """See LaunchedStep; after `tokens`."""
    logprobs: LogprobRows = dataclasses.field(default_factory=LogprobRows)
    """See LaunchedStep; after `tokens`."""

    def wait(self) -> None:
        """Waits until the device is done with it. Any thread may wait."""
        self.returned.wait()
        self.model_ns = self.clock.finish(self.started_ns)

    def tokens(self) -> list[int]:
        """See LaunchedStep."""
        words = self.returned.take()
        count = len(self.sampled)
        token_count = count + len(self.sibling_places)
        for place, token in zip(self.sibling_places, words[count:token_count].tolist(), strict=True):
            self.siblings.setdefault(place, []).append(token)
        if self.reports is not None:
            self.logprobs = self.reports.read(words, words[token_count:].reshape(-1, REPORT_WORDS))
        tokens: list[int] = words[:count].tolist()
        return tokens

    def durations(self) -> tuple[int, int]:
        """See LaunchedStep; choosing tokens is part of the model's graphs."""
        return self.model_ns, 0


@dataclasses.dataclass(slots=True)
class Clock:
    """Tells how long the device took for a step though another one was before it."""

    last_ns: int = 0
    """When the last step was done."""

    def finish(self, started_ns: int) -> int:
        """Notes that a step launched at `started_ns` is done now; returns how long the device had it alone."""
        now = time.perf_counter_ns()
        duration = now - max(started_ns, self.last_ns)
        self.last_ns = now
        return duration
