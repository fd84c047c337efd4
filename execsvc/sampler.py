"""Chooses the next token of each sequence from its logits.

A draw is a function of (seed, position, logits) and of nothing else: the same token comes out alone, in a batch, after
a preemption or on another executor of the same kind.
"""

from collections.abc import Sequence
import dataclasses
import math

import numpy as np
import torch

from execsvc.philox import uniform
from kernels.sampling.tensors import REPORTED
from quire.errors import InvalidRequestError

MAX_TEMPERATURE = 100.0
_MAX_PENALTY = 2.0
LOGPROB_LIMIT = REPORTED
"""Most likely tokens that are reported at most."""
NAMED_TOKEN_LIMIT = 2048
"""Tokens that a request may name at most, biased or withheld."""
_HEAD_COUNT = 1024
"""Most likely tokens that are looked at before the whole vocabulary is sorted."""


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingSpec:
    """How to choose, in this order.

    grammar, withheld, bias, repetition_penalty, frequency_penalty, presence_penalty; then, unless greedy: temperature,
    top_k, top_p, min_p, typical_p, draw.
    """

    temperature: float = 0.0
    """0 is greedy; then the rest has no effect."""
    top_k: int = 0
    """Keep this many most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most likely tokens whose probabilities reach this sum."""
    min_p: float = 0.0
    """Drop tokens less likely than this times the most likely one."""
    seed: int = 0
    """Key of the draws, 64 bits."""
    withheld: tuple[int, ...] = ()
    """Tokens that are not chosen at positions below `withheld_until`."""
    withheld_until: int = 0
    typical_p: float = 1.0
    """Keep the tokens of nearly the expected surprise whose probabilities reach this sum."""
    bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit)."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that the sequence has, and multiplies negative ones."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time it was generated."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of a token that was generated."""
    prompt_token_count: int = 0
    """Leading tokens that are not generated."""
    logprobs: int | None = None
    """Most likely tokens whose log-probabilities are reported beside the sampled one's; None for nothing."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    grammar: str = ""
    """What may be generated; see `execsvc.grammars`."""

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            InvalidRequestError: a value is out of range.
        """
        if not (math.isfinite(self.temperature) and 0.0 <= self.temperature <= MAX_TEMPERATURE):
            raise InvalidRequestError(
                f"temperature: {self.temperature} is out of range, allowed is 0 .. {MAX_TEMPERATURE:g}",
                field="temperature",
            )
        self._check_penalties()
        if self.temperature == 0.0:
            return
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidRequestError(f"top_p: {self.top_p} is out of range, allowed is 0 < p <= 1", field="top_p")
        if not 0.0 <= self.min_p <= 1.0:
            raise InvalidRequestError(f"min_p: {self.min_p} is out of range, allowed is 0 .. 1", field="min_p")
        if not 0.0 < self.typical_p <= 1.0:
            message = f"typical_p: {self.typical_p} is out of range, allowed is 0 < p <= 1"
            raise InvalidRequestError(message, field="typical_p")

    def _check_penalties(self) -> None:
        """Raises InvalidRequestError if what changes logits, or is reported of them, is out of range."""
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0.0):
            message = f"repetition_penalty: {self.repetition_penalty} is out of range, allowed is more than 0"
            raise InvalidRequestError(message, field="repetition_penalty")
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            if not -_MAX_PENALTY <= value <= _MAX_PENALTY:
                message = f"{name}: {value} is out of range, allowed is -{_MAX_PENALTY:g} .. {_MAX_PENALTY:g}"
                raise InvalidRequestError(message, field=name)
        if any(not math.isfinite(value) for _, value in self.bias):
            raise InvalidRequestError("bias_values: a value is not finite", field="bias_values")
        if len(self.bias) + len(self.withheld) > NAMED_TOKEN_LIMIT:
            message = (
                f"bias_tokens: {len(self.bias)} tokens and {len(self.withheld)} withheld ones, allowed are "
                f"{NAMED_TOKEN_LIMIT} together"
            )
            raise InvalidRequestError(message, field="bias_tokens")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and count > LOGPROB_LIMIT:
                message = f"{name}: {count} is out of range, allowed is 0 .. {LOGPROB_LIMIT}"
                raise InvalidRequestError(message, field=name)

    @property
    def penalizes(self) -> bool:
        """Whether the tokens of the sequence change the logits."""
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0

    @property
    def special(self) -> bool:
        """Whether it takes more than the logits, and a draw from them, to choose or to report."""
        changes = self.penalizes or bool(self.bias) or bool(self.grammar)
        return changes or self.logprobs is not None or self.typical_p < 1.0

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0.0

    @property
    def truncates(self) -> bool:
        """Whether less likely tokens are dropped before the draw."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0 or self.typical_p < 1.0


def sample(
    logits: torch.Tensor,
    specs: Sequence[SamplingSpec],
    positions: Sequence[int],
    best: Sequence[int] | None = None,
) -> list[int]:
    """Returns one token a row, or -1 for a row with logits that are not finite.

    Args:
        logits: `[row, vocabulary]`, any float type.
        specs: how to choose, a row each.
        positions: index in its sequence of the token drawn, a row each.
        best: the most likely token of each row, -1 for logits that are not finite, if who computed them knows.
    """
    allowed = _without_withheld(logits, specs, positions)
    if best is None or allowed is not logits:
        values, indexes = allowed.max(-1)
        tokens: list[int] = indexes.tolist()
        finite = torch.isfinite(values).tolist()
    else:
        tokens = list(best)
        finite = [token >= 0 for token in tokens]
    logits = allowed
    drawn = [row for row, spec in enumerate(specs) if not spec.greedy and finite[row]]
    if drawn:
        draws = uniform(
            np.array([specs[row].seed for row in drawn], dtype=np.uint64),
            np.array([positions[row] for row in drawn], dtype=np.uint64),
        )
        for row, draw in zip(drawn, draws.tolist(), strict=True):
            tokens[row] = _draw(logits[row], specs[row], draw)
    return [token if finite[row] else -1 for row, token in enumerate(tokens)]


def _without_withheld(logits: torch.Tensor, specs: Sequence[SamplingSpec], positions: Sequence[int]) -> torch.Tensor:
    """Returns the logits with those of withheld tokens at minus infinity; the logits themselves if there are none."""
    masked = [row for row, spec in enumerate(specs) if spec.withheld and positions[row] < spec.withheld_until]
    if masked:
        logits = logits.clone()
        for row in masked:
            logits[row, list(specs[row].withheld)] = -math.inf
    return logits


def _draw(logits: torch.Tensor, spec: SamplingSpec, draw: float) -> int:
    """Returns the token that `draw` in [0, 1) points at, for one row. Works on this row alone, in float64 sums."""
    scaled = logits.float() / spec.temperature
    if not spec.truncates:
        # float64 over the whole row: the total of 100,000 float32 weights would be off by more than a draw's bit.
        weights = torch.softmax(scaled, -1, dtype=torch.float64)
        return _pick(torch.cumsum(weights, -1), draw)
    weights, order = _most_likely(scaled, spec)
    if spec.top_p < 1.0:
        # A token stays while those before it do not reach top_p yet, so the first one always stays.
        reached = torch.cumsum(weights, -1)
        weights = torch.where(reached - weights < spec.top_p, weights, 0.0)
    if spec.min_p > 0.0:
        weights = torch.where(weights >= spec.min_p * weights[0], weights, 0.0)
    if spec.typical_p < 1.0:
        weights = _typical(weights, spec.typical_p)
    return int(order[_pick(torch.cumsum(weights, -1), draw)])


def _typical(weights: torch.Tensor, mass: float) -> torch.Tensor:
    """Returns the weights without those of tokens that are much more, or much less, of a surprise than expected.

    Kept are the tokens whose surprise is nearest to the entropy, as many as reach `mass` together. Source: Meister et
    al., "Locally Typical Sampling" (2022).
    """
    shares = weights / weights.sum()
    surprises = torch.where(shares > 0.0, -torch.log(shares), math.inf)
    entropy = torch.where(shares > 0.0, shares * surprises, 0.0).sum()
    order = torch.argsort((surprises - entropy).abs(), stable=True)
    reached = torch.cumsum(shares[order], -1)
    kept = torch.zeros_like(weights, dtype=torch.bool)
    kept[order] = reached - shares[order] < mass
    return torch.where(kept, weights, 0.0)


def _most_likely(scaled: torch.Tensor, spec: SamplingSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (probabilities in float64, tokens) of the candidates, most likely first.

    They are the top_k tokens, or as many as top_p and min_p can keep: sorting a whole vocabulary takes milliseconds, so
    the most likely _HEAD_COUNT are tried first. Equal values are in the order of their tokens.
    """
    vocabulary = scaled.shape[-1]
    count = min(spec.top_k, vocabulary) if spec.top_k else vocabulary
    if vocabulary > _HEAD_COUNT:
        order = most_likely(scaled, min(count, _HEAD_COUNT))
        values = scaled[order]
        if count <= _HEAD_COUNT:
            return torch.softmax(values, -1, dtype=torch.float64), order
        if not spec.top_k:
            weights = torch.exp(values.double() - torch.logsumexp(scaled.double(), -1))
            if float(weights.sum()) >= spec.top_p or float(weights[-1]) < spec.min_p * float(weights[0]):
                return weights, order
    values, order = torch.sort(scaled, descending=True, stable=True)
    return torch.softmax(values[:count], -1, dtype=torch.float64), order[:count]


def most_likely(values: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the `count` most likely tokens of one row, at least one, most likely first, equal ones by token."""
    # Which of equal values `topk` returns is left open: they are taken in order.
    least = torch.topk(values, count).values[-1]
    above = torch.nonzero(values > least)[:, 0]
    tokens = torch.cat([above, torch.nonzero(values == least)[: count - len(above), 0]])
    return tokens[torch.sort(values[tokens], descending=True, stable=True).indices]


def _pick(cumulative: torch.Tensor, draw: float) -> int:
    """Returns the first index whose cumulative weight exceeds draw * total."""
    target = draw * cumulative[-1:]
    index = int(torch.searchsorted(cumulative, target, right=True))
    # Rounding may leave the target at the total itself; then the last index with any weight is meant.
    return min(index, int(torch.searchsorted(cumulative, cumulative[-1:], right=False)))
