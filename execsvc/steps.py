"""What the engine asks of whoever computes its steps.

A step is launched, then waited for, then its tokens are taken. On the CPU it is done when `launch` returns. With a
device that works beside the host, `launch` returns at once: the engine may launch the next step before it has the
tokens of this one.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch

from execsvc.choosing import LogprobRows, Siblings
from execsvc.model.config import ModelConfig
from execsvc.sequences import RowObserver, Sequence, SequenceRows

Observe = Callable[[list[int], torch.Tensor], None]
"""Hears (tables, logits `[table, vocabulary]`) before tokens are chosen."""


class LaunchedStep(Protocol):
    """A step that is on its way, or done."""

    deferred: ClassVar[bool]
    """Whether there may be anything to wait for."""

    @property
    def sequences(self) -> list[Sequence]:
        """Sequences that it computes."""
        ...

    @property
    def lens(self) -> list[int]:
        """Computed tokens of each sequence after the step."""
        ...

    @property
    def sampled(self) -> list[int]:
        """Indexes into `sequences` of those that sample, in the order of the tokens."""
        ...

    def wait(self) -> None:
        """Waits until nothing of it is left to write. Any thread may wait."""
        ...

    def tokens(self) -> list[int]:
        """Returns the sampled tokens, -1 where the logits were not finite. Once, after `wait`."""
        ...

    @property
    def siblings(self) -> Siblings:
        """Tokens drawn for siblings of those that sample."""
        ...

    @property
    def logprobs(self) -> LogprobRows:
        """Log-probabilities that were asked for."""
        ...

    def durations(self) -> tuple[int, int]:
        """Returns the nanoseconds of the model and of sampling, after `wait`."""
        ...


class Steps(Protocol):
    """Computes steps, in the order of the calls."""

    config: ModelConfig

    @property
    def row_observer(self) -> RowObserver | None:
        """Who hears of changed rows, if the device keeps them."""
        ...

    def launch(
        self, rows: SequenceRows, scheduled: list[tuple[Sequence, int]], observe: Observe | None
    ) -> LaunchedStep:
        """Begins to compute (sequence, token count) pairs, which the caller has checked."""
        ...

    def mark(self) -> LaunchedStep:
        """Returns a step of nothing that is done when everything before it is."""
        ...

    def copy_blocks(self, pairs: npt.NDArray[np.int64]) -> None:
        """Copies blocks after the steps before: `[copy, 2]`, (source, destination)."""
        ...

    def synchronize(self) -> None:
        """Returns when nothing that was launched can write any more."""
        ...

    def calculate_kv_scales(self) -> None:
        """Lets what the next step writes decide by what keys and values are divided in a float8 cache."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class FinishedStep:
    """A step that was done when it was launched."""

    deferred: ClassVar[bool] = False
    sequences: list[Sequence] = dataclasses.field(default_factory=list)
    lens: list[int] = dataclasses.field(default_factory=list)
    sampled: list[int] = dataclasses.field(default_factory=list)
    chosen: list[int] = dataclasses.field(default_factory=list)
    model_ns: int = 0
    sample_ns: int = 0
    siblings: Siblings = dataclasses.field(default_factory=dict)
    logprobs: LogprobRows = dataclasses.field(default_factory=LogprobRows)

    def wait(self) -> None:
        """Does nothing."""

    def tokens(self) -> list[int]:
        """See LaunchedStep."""
        return self.chosen

    def durations(self) -> tuple[int, int]:
        """See LaunchedStep."""
        return self.model_ns, self.sample_ns
