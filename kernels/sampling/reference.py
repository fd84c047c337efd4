"""Plain torch in float64: sorts, and follows the rules of `execsvc.sampler`. What the kernels must equal."""

import math

import torch


def distribution(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (weights, tokens) of one row in the order in which a draw counts them; weights need not sum to 1.

    Tokens are in the order of the vocabulary if all are kept, else most likely first, equal ones by number. Kept are
    the top_k first (0: all), of these the first whose probabilities reach top_p, of these those with at least min_p
    times the probability of the first.

    Args:
        logits: `[vocabulary]`.
        temperature: positive divisor of the logits.
        top_k: see above.
        top_p: see above.
        min_p: see above.
    """
    scaled = logits.double() / temperature
    if top_k <= 0 and top_p >= 1.0 and min_p <= 0.0:
        return torch.softmax(scaled, -1), torch.arange(len(logits))
    values, order = torch.sort(scaled, descending=True, stable=True)
    weights = torch.softmax(values[: top_k if top_k > 0 else len(values)], -1)
    if top_p < 1.0:
        weights = torch.where(weights.cumsum(-1) - weights < top_p, weights, 0.0)
    weights = torch.where(weights >= min_p * weights[0], weights, 0.0)
    return weights, order[: len(weights)]


def choose(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float, draw: float) -> int:
    """Returns the token of one row that `draw` in [0, 1) points at; -1 if the logits are not finite."""
    largest = float(logits.max())
    if not math.isfinite(largest):
        return -1
    if temperature == 0.0:
        return int(torch.nonzero(logits == logits.max())[0, 0])
    weights, tokens = distribution(logits, temperature, top_k, top_p, min_p)
    cumulative = weights.cumsum(-1)
    place = int((cumulative <= draw * cumulative[-1]).sum())
    return int(tokens[min(place, int(torch.nonzero(weights)[-1, 0]))])


def adjust(
    logits: torch.Tensor,
    counts: dict[int, int],
    repetition: float,
    presence: float,
    frequency: float,
    bias: dict[int, float],
) -> torch.Tensor:
    """Returns one row's logits with penalties and bias, in float64.

    Args:
        logits: `[vocabulary]`.
        counts: token: how often it was produced; 0 for one that only the prompt has.
        repetition: logits of all these tokens are divided by it if positive, else multiplied (Keskar et al., 2019).
        presence: taken off if the token was produced.
        frequency: taken off for each time it was.
        bias: token: added.
    """
    out = logits.double().clone()
    for token, count in counts.items():
        out[token] = out[token] / repetition if out[token] > 0 else out[token] * repetition
        out[token] -= frequency * count + presence * (count > 0)
    for token, added in bias.items():
        out[token] += added
    return out
