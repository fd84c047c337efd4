"""Chooses tokens on the device: the rules of `execsvc.sampler`, with no word from the host.

Shapes depend on no content, so that it can be captured in a graph.
"""

from __future__ import annotations

from typing import Protocol

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10


class DeviceSampler(Protocol):
    """Chooses one token a row."""

    def most_likely(self, logits: torch.Tensor, out: torch.Tensor) -> None:
        """Takes the most likely token of each row; -1 where the logits are not finite. Writes `out` `[row]` int32."""
        ...

    def sample(self, logits: torch.Tensor, params: torch.Tensor, positions: torch.Tensor, out: torch.Tensor) -> None:
        """Chooses as the parameters say; temperature 0 takes the most likely token.

        Args:
            logits: `[row, vocabulary]`, any float type.
            params: `[parameter, row]` int32, see `kernels.step_state.tensors.PARAMETERS`.
            positions: `[row]` int32: index in its sequence of the token drawn.
            out: `[row]` int32, written; -1 where the logits are not finite.
        """
        ...


class TorchSampler:
    """Sorts, in torch."""

    def most_likely(self, logits: torch.Tensor, out: torch.Tensor) -> None:
        """See DeviceSampler."""
        values, tokens = logits.max(-1)
        out.copy_(torch.where(torch.isfinite(values), tokens, -1))

    def sample(self, logits: torch.Tensor, params: torch.Tensor, positions: torch.Tensor, out: torch.Tensor) -> None:
        """See DeviceSampler."""
        vocabulary = logits.shape[-1]
        temperature, top_k = params[0].view(torch.float32), params[1]
        top_p, min_p = params[2].view(torch.float32), params[3].view(torch.float32)
        greedy = temperature == 0.0
        best_values, best = logits.max(-1)
        scaled = logits.float() / torch.where(greedy, 1.0, temperature)[:, None]
        truncates = (top_k > 0) | (top_p < 1.0) | (min_p > 0.0)
        in_order = torch.arange(vocabulary, device=logits.device)
        order = torch.where(truncates[:, None], torch.sort(scaled, descending=True, stable=True).indices, in_order)
        kept = torch.where(top_k > 0, top_k, vocabulary).clamp_max(vocabulary)
        ordered = scaled.gather(-1, order).masked_fill(in_order >= kept[:, None], float("-inf"))
        weights = torch.softmax(ordered, -1, dtype=torch.float64)
        before = torch.cumsum(weights, -1) - weights
        weights = weights.masked_fill(truncates[:, None] & (before >= top_p[:, None]), 0.0)
        weights = weights.masked_fill(truncates[:, None] & (weights < min_p[:, None] * weights[:, :1]), 0.0)
        cumulative = torch.cumsum(weights, -1)
        target = uniform(params[4:6], positions)[:, None] * cumulative[:, -1:]
        index = torch.searchsorted(cumulative, target, right=True)
        index = torch.minimum(index, torch.searchsorted(cumulative, cumulative[:, -1:].contiguous(), right=False))
        drawn = order.gather(-1, index.clamp_max(vocabulary - 1))[:, 0]
        out.copy_(torch.where(torch.isfinite(best_values), torch.where(greedy, best, drawn), -1))


class TritonSampler:
    """Triton kernels: one pass over the logits and a part of them again, no sorting."""

    def __init__(self, row_count: int, vocabulary: int, device: torch.device) -> None:
        """Prepares for up to `row_count` rows of `vocabulary` logits."""
        from kernels.sampling import choose, tensors  # noqa: PLC0415 - triton is imported only where it is used

        self._choose, self._choice = choose, tensors.Choice
        self._workspace = tensors.Workspace.allocate(row_count, vocabulary, device)

    def most_likely(self, logits: torch.Tensor, out: torch.Tensor) -> None:
        """See DeviceSampler."""
        self._choose.most_likely(logits, out, self._workspace)

    def sample(self, logits: torch.Tensor, params: torch.Tensor, positions: torch.Tensor, out: torch.Tensor) -> None:
        """See DeviceSampler."""
        floats = params.view(torch.float32)
        choice = self._choice(floats[0], params[1], floats[2], floats[3], params[4], params[5])
        self._choose.sample(logits, choice, positions, out, self._workspace)


def uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Returns one number in [0, 1) for each row, `[row]` float64: the bits of `execsvc.philox.uniform`.

    Args:
        seeds: `[2, row]` int32, low and high words.
        positions: `[row]` int32.
    """
    c0, zeros = positions.long() & _MASK, torch.zeros_like(positions, dtype=torch.int64)
    c1, c2, c3 = zeros, zeros, zeros
    k0, k1 = seeds[0].long() & _MASK, seeds[1].long() & _MASK
    for _ in range(_ROUNDS):
        # Products of 32-bit words wrap in signed 64 bits; the masks undo the sign.
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((high >> 32) & _MASK) ^ c1 ^ k0, high & _MASK
        c2, c3 = ((low >> 32) & _MASK) ^ c3 ^ k1, low & _MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return ((c0 >> 5) * 2**26 + (c1 >> 6)).double() * 2.0**-53
