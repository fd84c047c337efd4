"""Plain torch in float64: sorts, and follows the rules of `execsvc.sampler`. What the kernels must equal."""

from collections.abc import Iterable
import math

import torch


def distribution(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float, typical_p: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (weights, tokens) of one row in the order in which a draw counts them; weights need not sum to 1.

    Tokens are in the order of the vocabulary if all are kept, else most likely first, equal ones by number. Kept are
    the top_k first (0: all), of these the first whose probabilities reach top_p, of these those with at least min_p
    times the probability of the first, of these those whose surprise, -log of their share, is nearest to its expected
    value, as many as reach typical_p together (Meister et al., 2022, <https://arxiv.org/abs/2202.00666>).

    Args:
        logits: `[vocabulary]`.
        temperature: positive divisor of the logits.
        top_k: see above.
        top_p: see above.
        min_p: see above.
        typical_p: see above.
    """
    scaled = logits.double() / temperature
    if top_k <= 0 and top_p >= 1.0 and min_p <= 0.0 and typical_p >= 1.0:
        return torch.softmax(scaled, -1), torch.arange(len(logits))
    values, order = torch.sort(scaled, descending=True, stable=True)
    weights = torch.softmax(values[: top_k if top_k > 0 else len(values)], -1)
    if top_p < 1.0:
        weights = torch.where(weights.cumsum(-1) - weights < top_p, weights, 0.0)
    weights = torch.where(weights >= min_p * weights[0], weights, 0.0)
    if typical_p < 1.0:
        shares = weights / weights.sum()
        surprises = -torch.log(shares)
        entropy = torch.where(shares > 0.0, shares * surprises, 0.0).sum()
        nearest = torch.argsort((surprises - entropy).abs(), stable=True)
        before = shares[nearest].cumsum(-1) - shares[nearest]
        weights[nearest[before >= typical_p]] = 0.0
    return weights, order[: len(weights)]


def choose(
    logits: torch.Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    draw: float,
    typical_p: float = 1.0,
) -> int:
    """Returns the token of one row that `draw` in [0, 1) points at; -1 if the logits are not finite."""
    largest = float(logits.max())
    if not math.isfinite(largest):
        return -1
    if temperature == 0.0:
        return int(torch.nonzero(logits == logits.max())[0, 0])
    weights, tokens = distribution(logits, temperature, top_k, top_p, min_p, typical_p)
    cumulative = weights.cumsum(-1)
    place = int((cumulative <= draw * cumulative[-1]).sum())
    return int(tokens[min(place, int(torch.nonzero(weights)[-1, 0]))])


def change(
    logits: torch.Tensor,
    seen: torch.Tensor,
    repetition: float,
    presence: float,
    frequency: float,
    bias: dict[int, float],
    impossible: Iterable[int] = (),
) -> torch.Tensor:
    """Returns one row's logits with bias and penalties, in float64.

    Args:
        logits: `[vocabulary]`.
        seen: `[vocabulary]`: twice how often each token was produced, plus one if the prompt has it.
        repetition: logits of tokens seen are divided by it if positive, else multiplied (Keskar et al., 2019).
        presence: taken off if the token was produced.
        frequency: taken off for each time it was.
        bias: token: added before.
        impossible: tokens that a grammar does not allow or that are withheld.
    """
    out = logits.double().clone()
    for token, added in bias.items():
        out[token] += added
    out[list(impossible)] = -math.inf
    out = torch.where(seen > 0, torch.where(out > 0, out / repetition, out * repetition), out)
    produced = seen.long() >> 1
    return torch.where(produced > 0, out - frequency * produced - presence, out)


def report(logits: torch.Tensor, token: int, count: int) -> tuple[int, float, list[int], list[float]]:
    """Returns (rank of a token, its log-probability, the `count` most likely tokens, their log-probabilities)."""
    logarithms = torch.log_softmax(logits.double(), -1)
    values, tokens = torch.sort(logarithms, descending=True, stable=True)
    rank = int((logits > logits[token]).sum()) + 1
    return rank, float(logarithms[token]), tokens[:count].tolist(), values[:count].tolist()
