"""How much memory the open tables will need: a life table of output lengths, and the trajectory that follows from it.

A sequence's age is the tokens it has generated. The life table keeps, for each span of ages, how many sequences entered
it and how many ended in it; their quotient is the hazard (Kaplan and Meier's estimate). Sequences that still run, or
were cancelled or preempted, count as having lived so far: to learn from ended ones alone would take the short ones for
the rule. Where nothing is known yet, one sequence is assumed that ends after `_PRIOR_TOKENS` on average. What a request
asks for at least (`min_tokens`, or all of it with `ignore_eos`) is certain, and nothing is learned from it.

From the hazards follows the chance that a table is still there some steps ahead, and from that the mean and the
variance of the blocks in use then. An admission that would take the mean and a margin of deviations above the pool at
a few times near ahead has to wait. So does one after which it is all but certain that the pool will not do later on.

The margin is not a constant: it rises while more of all computing than `RECOMPUTE_SHARE` is done again after
preemptions, and falls while it is less. How much room the same pool needs depends on its size in sequences and on how
long and how various their outputs are; the share that is computed twice says it for all of them.

Pure and deterministic: the state is columns of floats and a few sums, a step is a token.
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
_PRIOR_TOKENS: Final = 256.0
"""Mean output of the one sequence that is assumed besides those seen."""

_EXTINCT: Final = 1e-12
"""A chance below this is none."""
_NO_LIMIT: Final = 2**31
_PROMPT_LIMIT: Final = 65_536
"""Preempted sequences whose prompt lengths are remembered."""

NEAR: Final = (16, 32, 64)
"""Steps ahead at which there must be room for the mean and the margin of deviations."""
FAR: Final = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)
"""Steps ahead at which the mean less one deviation must find room; looked at where something is certain."""

RECOMPUTE_SHARE: Final = 0.026
"""Share of computed tokens that may be computed a second time."""
_MARGIN_AT_FIRST: Final = 1.25
_MARGIN_LEAST: Final = 0.5
_MARGIN_MOST: Final = 4.0
_GAIN: Final = 0.05
"""Deviations by which the margin falls while the pool is filled `_SPAN` times and nothing is computed twice."""
_SPAN: Final = 4
"""Fillings of the pool over which the share is averaged."""


def _edges() -> Floats:
    octaves = 2.0 ** np.arange(_OCTAVES)[:, None] * (1 + np.arange(_SPANS_PER_OCTAVE) / _SPANS_PER_OCTAVE)
    return np.concatenate((np.arange(_LINEAR_AGES), _LINEAR_AGES * octaves.reshape(-1)))


_EDGES: Final = _edges()
_PRIOR_HAZARD: Final = 1 - np.exp(-np.diff(_EDGES, append=2 * _EDGES[-1]) / _PRIOR_TOKENS)


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
        entered = self.entered + passed[1 : len(_EDGES) + 1] + 1
        hazards = np.minimum((self.ended + _PRIOR_HAZARD) / entered, 1.0)
        return np.concatenate(([1.0], np.cumprod(1 - hazards)[:-1]))


def trajectory(
    survival: Floats,
    ages: Column,
    tokens: Column,
    least: Column,
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
        least: `[table]` tokens that it will have at least.
        limits: `[table]` most tokens that it may have.
        blocks: `[table]` blocks that return when it ends.
        block_size: tokens in a block.
        horizons: `[time]` steps ahead.
        block_limit: most blocks that a table has at one time, where a sliding window bounds them.
    """
    certain = ages + np.maximum(least - tokens, 0)
    now = np.interp(certain, _EDGES, survival)
    later = np.interp(np.maximum(ages[:, None] + horizons, certain[:, None]), _EDGES, survival)
    alive = later / np.maximum(now, _EXTINCT)[:, None]
    alive[(tokens[:, None] + horizons) >= limits[:, None]] = 0.0
    alive[now <= _EXTINCT] = 0.0
    later_blocks = -(-np.minimum(tokens[:, None] + horizons, limits[:, None]) // block_size)
    grown = np.minimum(later_blocks, block_limit) - np.minimum(-(-tokens // block_size), block_limit)[:, None]
    mean = (alive * grown - (1 - alive) * blocks[:, None]).sum(axis=0)
    variance = (alive * (1 - alive) * (grown + blocks[:, None]) ** 2).sum(axis=0)
    return mean, variance


def _horizons(certain: Column) -> Column:
    """Returns the steps ahead to look at, the near ones first.

    Args:
        certain: `[table]` tokens that each will certainly generate yet; the last of them is when it needs most.
    """
    if certain.max() <= NEAR[-1]:
        return np.array(NEAR, np.int64)
    ends = certain[certain > NEAR[-1]]
    return np.array((*NEAR, *FAR, int(ends.min()) - 1, int(ends.max()) - 1, max(1, int(certain[-1]) - 1)), np.int64)


class RecomputeControl:
    """Keeps the share of tokens that are computed twice at `RECOMPUTE_SHARE`, by the margin of admissions.

    An integral controller over a share that is averaged with exponential weights.

    Attributes:
        margin: deviations of the forecast for which there must be room.
        share: of the tokens computed of late, those computed a second time.
    """

    __slots__ = ("_computed", "_recomputed", "_span", "margin", "share")

    def __init__(self, slot_count: int) -> None:
        """Starts for a pool of so many token slots."""
        self.margin = _MARGIN_AT_FIRST
        self.share = RECOMPUTE_SHARE
        self._span = float(_SPAN * slot_count)
        self._computed = 0
        self._recomputed = 0

    def count(self, computed: int, recomputed: int) -> None:
        """Takes in tokens that were computed, and how many of these not for the first time."""
        self._computed += computed
        self._recomputed += recomputed
        if self._computed * _SPAN * _SPAN < self._span:
            return
        weight = min(1.0, self._computed / self._span)
        self.share += (self._recomputed / self._computed - self.share) * weight
        margin = self.margin + _GAIN * (self.share / RECOMPUTE_SHARE - 1) * weight
        self.margin = min(_MARGIN_MOST, max(_MARGIN_LEAST, margin))
        self._computed = self._recomputed = 0


class AdmissionForecast:
    """Decides whether there will be room for one more table.

    Attributes:
        outputs: the life table.
        control: sets the margin.
    """

    def __init__(self, spec: PoolSpec) -> None:
        self._spec = spec
        self._block_limit = spec.sequence_block_limit if spec.window else _NO_LIMIT
        self.outputs = OutputForecast()
        self.control = RecomputeControl(spec.usable_block_count * spec.block_size)
        # Lengths of the prompts of preempted sequences, whose next admission names more tokens than these.
        self._prompts: dict[str, int] = {}

    def require_room(self, request: AdmitRequest, tables: TableColumns, new_count: int, available: int) -> None:
        """Raises BlockPoolExhaustedError if the admission of `new_count` blocks would leave too few for what runs.

        Where nothing runs nothing is kept free: a lone request is never held back by a forecast.
        """
        slots = np.flatnonzero(tables.counter >= 0)
        if not len(slots):
            return
        size = self._spec.block_size
        # Tokens are told of when a block is full: one that was begun since is half full on average.
        tokens, held = tables.tokens[slots], tables.length[slots] * size
        tokens = np.where(held > tokens, np.minimum(tokens + size // 2, held), tokens)
        ages = tokens - tables.prompt[slots]
        known = len(request.token_ids) // 4
        prompt = self._prompts.get(f"{request.request_id}/{request.sample_index}", known)
        survival = self.outputs.survival(ages)
        tokens = np.append(tokens, known)
        least = np.append(tables.least[slots], known + request.min_new_tokens)
        horizons = _horizons(least - tokens)
        mean, variance = trajectory(
            survival,
            np.append(ages, known - prompt),
            tokens,
            least,
            np.append(tables.limit[slots], known + request.max_new_tokens),
            np.append(np.minimum(tables.length[slots] - tables.found[slots], self._block_limit), new_count),
            size,
            horizons,
            self._block_limit,
        )
        margins = np.full(len(horizons), -1.0)
        margins[: len(NEAR)] = self.control.margin
        need = new_count + mean + margins * np.sqrt(variance)
        worst = float(need.max())
        if worst > available:
            ahead = int(horizons[int(need.argmax())])
            raise BlockPoolExhaustedError(
                f"{worst:.0f} blocks are forecast to be needed {ahead} steps ahead, {available} are available",
                metadata={"needed_block_count": int(worst) + 1, "available_block_count": available},
                retry_after=RETRY_AFTER_SECONDS,
            )

    def opened(self, request: AdmitRequest, tables: TableColumns, slot: int, cached_token_count: int) -> None:
        """Notes the prompt and the limit of a table that was opened; a resumed one keeps the prompt it began with."""
        known = int(tables.tokens[slot])
        prompt = self._prompts.pop(f"{request.request_id}/{request.sample_index}", known)
        tables.prompt[slot] = prompt
        tables.opened[slot] = known
        tables.limit[slot] = known + request.max_new_tokens
        tables.least[slot] = known + request.min_new_tokens
        if request.resumed:
            # What survived of a preempted sequence was its own, and returns with it.
            tables.found[slot] = 0
        computed = known - max(cached_token_count, request.swapped_token_count)
        # The last token that is known was sampled, and is computed for the first time now.
        twice = request.resumed and not request.swapped_token_count
        self.control.count(computed, computed - 1 if twice else 0)

    def closed(self, record: TableRecord, reason: CloseReason, tables: TableColumns, slot: int) -> None:
        """Learns from a table that is about to be closed."""
        known, opened = int(tables.tokens[slot]), int(tables.opened[slot])
        prompt = int(tables.prompt[slot])
        certain = max(opened, int(tables.least[slot]))
        if known > certain:
            self.outputs.observe(certain - prompt, known - prompt, ended=reason == CloseReason.FINISHED)
        self.control.count(known - opened, 0)
        if reason.comes_back:
            # One that is cancelled while it waits is never admitted again: the oldest make room.
            if len(self._prompts) >= _PROMPT_LIMIT:
                del self._prompts[next(iter(self._prompts))]
            self._prompts[record.sequence_id] = prompt
