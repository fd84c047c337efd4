"""Beam search: which continuations of which beams go on.

Of all continuations of all beams the likeliest are looked at, as many as could end and still leave enough. Those that
end are finished, if they are among the first; of the others the first go on. The rules are those of Transformers.
Pure: log-probabilities in, continuations out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
import dataclasses
import math


@dataclasses.dataclass(frozen=True, slots=True)
class Hypothesis:
    """A completion and how good it is."""

    tokens: tuple[int, ...]
    score: float
    """Sum of the log-probabilities, over the length to the power of the length penalty."""


@dataclasses.dataclass(frozen=True, slots=True)
class BeamSettings:
    """What a search is to find."""

    width: int
    """Beams that go on."""
    length_penalty: float = 1.0
    early_stopping: bool = False
    """Whether it ends as soon as `width` hypotheses are finished, though better ones may come."""

    def candidate_count(self, end_count: int) -> int:
        """Returns how many likeliest continuations of each beam are looked at, where `end_count` tokens are ends."""
        return max(2, 1 + end_count) * self.width


class BeamSearch:
    """One search.

    Args:
        settings: what is to be found.
        ends: tokens that end a completion.
        max_tokens: longest completion.
    """

    def __init__(self, settings: BeamSettings, ends: Collection[int], max_tokens: int) -> None:
        self._settings = settings
        self._ends = frozenset(ends)
        self._max_tokens = max_tokens
        self._running: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        self._finished: list[Hypothesis] = []
        self.done = False

    def advance(self, candidates: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, int]]:
        """Takes the likeliest next (token, log-probability) pairs of each beam, the likeliest first.

        Returns:
            (beam, token) of the beams that go on, the best first; none once the search is done.
        """
        width = self._settings.width
        options = [
            (score + logprob, beam, token)
            for beam, (score, _) in enumerate(self._running)
            for token, logprob in candidates[beam]
        ]
        options.sort(key=lambda option: (-option[0], option[1]))
        options = options[: self._settings.candidate_count(len(self._ends))]
        length = len(self._running[0][1]) + 1
        ending = [token in self._ends or length >= self._max_tokens for _, _, token in options]
        self._finish([option for option, ends in zip(options[:width], ending, strict=False) if ends], length)
        going = [option for option, ends in zip(options, ending, strict=True) if not ends][:width]
        if going:
            self._running = [(score, (*self._running[beam][1], token)) for score, beam, token in going]
        self.done = not going or self._may_stop(length)
        return [] if self.done else [(beam, token) for _, beam, token in going]

    def _finish(self, options: list[tuple[float, int, int]], length: int) -> None:
        """Keeps the best finished hypotheses."""
        new = [
            Hypothesis((*self._running[beam][1], token), self._score(score, length)) for score, beam, token in options
        ]
        ranked = sorted([*self._finished, *new], key=lambda hypothesis: -hypothesis.score)
        self._finished = ranked[: self._settings.width]

    def _may_stop(self, length: int) -> bool:
        """Whether nothing that goes on could still be better than the worst that is finished."""
        if len(self._finished) < self._settings.width:
            return False
        if self._settings.early_stopping:
            return True
        return self._score(self._running[0][0], length) <= self._finished[-1].score

    def _score(self, total: float, length: int) -> float:
        return total / math.pow(length, self._settings.length_penalty)

    def best(self, count: int) -> list[Hypothesis]:
        """Returns the best hypotheses, the best first; before the end what goes on counts, too."""
        found = list(self._finished)
        if not self.done:
            found += [Hypothesis(tokens, self._score(score, max(1, len(tokens)))) for score, tokens in self._running]
        return sorted(found, key=lambda hypothesis: -hypothesis.score)[:count]
