"""How much memory the open tables will need: a life table of output lengths, and the trajectory that follows from it.

A sequence's age is the tokens it has generated. The life table keeps, for each span of ages, how many sequences entered
it and how many ended in it; their quotient is the hazard (Kaplan and Meier's estimate). Sequences that still run, or
were cancelled or preempted, count as having lived so far: to learn from ended ones alone would take the short ones for
the rule. Where nothing is known the hazard is 0: a sequence goes on to the limit that its request gave.

From the hazards follows the chance that a table is still there some steps ahead, and from that the mean and the
variance of the blocks in use then. An admission that would take the mean and a margin of deviations above the pool at
any of a few times ahead has to wait.

Pure and deterministic: the state is three columns of floats, a step is a token.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from memsvc.core.pool import RETRY_AFTER_SECONDS
from memsvc.core.table import TableColumns, TableRecord
from quire.errors import BlockPoolExhaustedError
from quire.memory import AdmitRequest, CloseReason, PoolSpec

Column = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_LINEAR_AGES: Final = 32
_SPANS_PER_OCTAVE: Final = 16
_OCTAVES: Final = 17
_MEMORY: Final = 512.0
"""Sequences after which an observation counts 1/e."""
_DOUBT: Final = 0.5
"""Sequences that are assumed to have survived every span, besides those seen."""

_EXTINCT: Final = 1e-12
"""A chance below this is none."""
_NO_LIMIT: Final = 2**31
_PROMPT_LIMIT: Final = 65_536
"""Preempted sequences whose prompt lengths are remembered."""

HORIZONS = np.array([8, 16, 32, 64], np.int64)
MARGIN = 0.0


def _edges() -> Floats:
    octaves = 2.0 ** np.arange(_OCTAVES)[:, None] * (1 + np.arange(_SPANS_PER_OCTAVE) / _SPANS_PER_OCTAVE)
    return np.concatenate((np.arange(_LINEAR_AGES), _LINEAR_AGES * octaves.reshape(-1)))


_EDGES: Final = _edges()


class OutputForecast:
    """The life table.

    Attributes:
        entered: `[span]` sequences that reached the span's first age, older ones counting less.
        ended: `[span]` sequences that ended in it.
    """

    __slots__ = ("ended", "entered")

    def __init__(self) -> None:
        """Knows nothing."""
        self.entered = np.zeros(len(_EDGES))
        self.ended = np.zeros(len(_EDGES))

    def observe(self, start: int, age: int, *, ended: bool) -> None:
        """Takes in a table that is closed.

        Args:
            start: age at which it was opened; not 0 for one that was preempted before.
            age: age at which it was closed.
            ended: whether the sequence is finished, not only its table.
        """
        first = int(np.searchsorted(_EDGES, start, "left"))
        last = int(np.searchsorted(_EDGES, age, "left"))
        self.entered[first:last] += 1
        if ended:
            self.ended[max(0, last - 1)] += 1
            keep = 1 - 1 / _MEMORY
            self.entered *= keep
            self.ended *= keep

    def survival(self, ages: Column) -> Floats:
        """Returns the chance to go on beyond each of the spans' first ages, given the running sequences' ages."""
        passed = np.bincount(np.searchsorted(_EDGES, ages, "right"), minlength=len(_EDGES) + 1)[::-1].cumsum()[::-1]
        entered = self.entered + passed[1 : len(_EDGES) + 1] + _DOUBT
        hazards = np.minimum(self.ended / entered, 1.0)
        return np.concatenate(([1.0], np.cumprod(1 - hazards)[:-1]))


def trajectory(
    survival: Floats,
    ages: Column,
    tokens: Column,
    limits: Column,
    blocks: Column,
    block_size: int,
    horizons: Column,
    block_limit: int = _NO_LIMIT,
) -> tuple[Floats, Floats]:
    """Returns mean and variance of the change of the blocks in use, at each of `horizons`.

    Args:
        survival: see `OutputForecast.survival`.
        ages: `[table]` tokens generated.
        tokens: `[table]` tokens known.
        limits: `[table]` most tokens that it may have.
        blocks: `[table]` blocks that return when it ends.
        block_size: tokens in a block.
        horizons: `[time]` steps ahead.
        block_limit: most blocks that a table has at one time, where a sliding window bounds them.
    """
    now = np.interp(ages, _EDGES, survival)
    later = np.interp(ages[:, None] + horizons, _EDGES, survival)
    alive = later / np.maximum(now, _EXTINCT)[:, None]
    alive[(tokens[:, None] + horizons) >= limits[:, None]] = 0.0
    alive[now <= _EXTINCT] = 0.0
    later_blocks = -(-np.minimum(tokens[:, None] + horizons, limits[:, None]) // block_size)
    grown = np.minimum(later_blocks, block_limit) - np.minimum(-(-tokens // block_size), block_limit)[:, None]
    mean = (alive * grown - (1 - alive) * blocks[:, None]).sum(axis=0)
    variance = (alive * (1 - alive) * (grown + blocks[:, None]) ** 2).sum(axis=0)
    return mean, variance


class AdmissionForecast:
    """Decides whether there will be room for one more table."""

    def __init__(self, spec: PoolSpec) -> None:
        self._spec = spec
        self._block_limit = spec.sequence_block_limit if spec.window else _NO_LIMIT
        self.outputs = OutputForecast()
        # Lengths of the prompts of preempted sequences, whose next admission names more tokens than these.
        self._prompts: dict[str, int] = {}

    def require_room(self, request: AdmitRequest, tables: TableColumns, new_count: int, available: int) -> None:
        """Raises BlockPoolExhaustedError if the admission of `new_count` blocks would leave too few for what runs."""
        slots = np.flatnonzero(tables.counter >= 0)
        if not len(slots):
            return
        tokens = tables.tokens[slots]
        ages = tokens - tables.prompt[slots]
        known = len(request.token_ids) // 4
        prompt = self._prompts.get(f"{request.request_id}/{request.sample_index}", known)
        survival = self.outputs.survival(ages)
        size = self._spec.block_size
        blocks = np.minimum(-(-tokens // size) - tables.found[slots], self._block_limit)
        mean, variance = trajectory(
            survival,
            np.append(ages, known - prompt),
            np.append(tokens, known),
            np.append(tables.limit[slots], known + request.max_new_tokens),
            np.append(blocks, new_count),
            size,
            HORIZONS,
            self._block_limit,
        )
        need = new_count + mean + MARGIN * np.sqrt(variance)
        worst = float(need.max())
        if worst > available:
            raise BlockPoolExhaustedError(
                f"{worst:.0f} blocks are forecast to be needed and {available} are available",
                metadata={"needed_block_count": int(worst) + 1, "available_block_count": available},
                retry_after=RETRY_AFTER_SECONDS,
            )

    def opened(self, request: AdmitRequest, tables: TableColumns, slot: int) -> None:
        """Notes the prompt and the limit of a table that was opened; a resumed one keeps the prompt it began with."""
        known = int(tables.tokens[slot])
        prompt = self._prompts.pop(f"{request.request_id}/{request.sample_index}", known)
        tables.prompt[slot] = prompt
        tables.opened[slot] = known
        tables.limit[slot] = known + request.max_new_tokens

    def closed(self, record: TableRecord, reason: CloseReason, tables: TableColumns, slot: int) -> None:
        """Learns from a table that is about to be closed."""
        prompt = int(tables.prompt[slot])
        age = int(tables.tokens[slot]) - prompt
        start = int(tables.opened[slot]) - prompt
        self.outputs.observe(start, age, ended=reason == CloseReason.FINISHED)
        if reason == CloseReason.PREEMPTED:
            # One that is cancelled while it waits is never admitted again: the oldest make room.
            if len(self._prompts) >= _PROMPT_LIMIT:
                del self._prompts[next(iter(self._prompts))]
            self._prompts[record.sequence_id] = prompt
