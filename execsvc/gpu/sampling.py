"""Chooses tokens on the device: the rules of `execsvc.sampler`, with no word from the host.

Shapes depend on no content, so that it can be captured in a graph.
"""

from __future__ import annotations

import dataclasses
from typing import Final, Protocol

import torch
from torch.nn import functional

from kernels.sampling.tensors import REPORTED, Changes, Choice, Penalties, Workspace
from kernels.step_state.tensors import PARAMETERS

LOGPROBS: Final = PARAMETERS.index("logprobs")
_INTEGERS: Final = frozenset({"top_k", "seed_low", "seed_high", "withheld_until", "logprobs"})
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10


class DeviceSampler(Protocol):
    """Chooses one token a row. Parameters are `[parameter, row]` int32, see `kernels.step_state.tensors.PARAMETERS`."""

    def most_likely(self, logits: torch.Tensor, out: torch.Tensor) -> None:
        """Takes the most likely token of each row; -1 where the logits are not finite. Writes `out` `[row]` int32."""
        ...

    def sample(self, logits: torch.Tensor, params: torch.Tensor, positions: torch.Tensor, out: torch.Tensor) -> None:
        """Chooses as the parameters say; temperature 0 takes the most likely token.

        Args:
            logits: `[row, vocabulary]`, any float type.
            params: see DeviceSampler.
            positions: `[row]` int32: index in its sequence of the token drawn.
            out: `[row]` int32, written; -1 where the logits are not finite.
        """
        ...

    def sample_changed(
        self,
        logits: torch.Tensor,
        changes: Changes,
        params: torch.Tensor,
        positions: torch.Tensor,
        out: torch.Tensor,
        reports: torch.Tensor,
    ) -> torch.Tensor:
        """Chooses from changed logits, reports of those given, and counts the tokens. Writes `changes.seen`.

        Args:
            logits: see `sample`.
            changes: what changes them.
            params: see DeviceSampler.
            positions: see `sample`.
            out: see `sample`.
            reports: `[row, REPORT_WORDS]` int32, written where the parameters ask for it and a token was chosen.

        Returns:
            The changed logits, float32, until the next call.
        """
        ...

    def report(self, logits: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor, reports: torch.Tensor) -> None:
        """Reports given tokens `[row]` int32; see `kernels.sampling.choose.report`. Writes `reports`."""
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
        named = parameters(params)
        temperature, top_k, top_p = named["temperature"], named["top_k"], named["top_p"][:, None]
        typical_p, min_p = named["typical_p"][:, None], named["min_p"][:, None]
        greedy = temperature == 0.0
        best_values, best = logits.max(-1)
        scaled = logits.float() / torch.where(greedy, 1.0, temperature)[:, None]
        truncates = (top_k[:, None] > 0) | (top_p < 1.0) | (min_p > 0.0) | (typical_p < 1.0)
        in_order = torch.arange(vocabulary, device=logits.device)
        order = torch.where(truncates, torch.sort(scaled, descending=True, stable=True).indices, in_order)
        kept = torch.where(top_k > 0, top_k, vocabulary).clamp_max(vocabulary)
        ordered = scaled.gather(-1, order).masked_fill(in_order >= kept[:, None], float("-inf"))
        weights = torch.softmax(ordered, -1, dtype=torch.float64)
        before = torch.cumsum(weights, -1) - weights
        weights = weights.masked_fill(truncates & (before >= top_p), 0.0)
        weights = weights.masked_fill(truncates & (weights < min_p * weights[:, :1]), 0.0)
        weights = torch.where(typical_p < 1.0, _typical(weights, typical_p), weights)
        cumulative = torch.cumsum(weights, -1)
        target = uniform(params[4:6], positions)[:, None] * cumulative[:, -1:]
        index = torch.searchsorted(cumulative, target, right=True)
        index = torch.minimum(index, torch.searchsorted(cumulative, cumulative[:, -1:].contiguous(), right=False))
        drawn = order.gather(-1, index.clamp_max(vocabulary - 1))[:, 0]
        out.copy_(torch.where(torch.isfinite(best_values), torch.where(greedy, best, drawn), -1))

    def sample_changed(
        self,
        logits: torch.Tensor,
        changes: Changes,
        params: torch.Tensor,
        positions: torch.Tensor,
        out: torch.Tensor,
        reports: torch.Tensor,
    ) -> torch.Tensor:
        """See DeviceSampler."""
        named = parameters(params)
        vocabulary = logits.shape[-1]
        tokens = torch.arange(vocabulary, device=logits.device)
        words = changes.masks[changes.mask_places.clamp_min(0).long()][:, tokens // 32]
        forbidden = ((words >> (tokens % 32)) & 1 == 0) & (changes.mask_places >= 0)[:, None]
        changed = logits.float().masked_fill(forbidden, float("-inf"))
        used, rows = (changes.rows >= 0)[:, None], changes.rows.clamp_min(0).long()
        entries = changes.entry_tokens[rows]
        there = (torch.arange(entries.shape[1], device=logits.device) < changes.entry_counts[rows][:, None]) & used
        withheld = there & (entries < 0) & (positions < named["withheld_until"])[:, None]
        bias = torch.where(withheld, float("-inf"), changes.entry_bias[rows])
        # One column more takes the entries that are not in use.
        added = changed.new_zeros(len(changed), vocabulary + 1)
        added.scatter_(1, torch.where(there, entries & 0x7FFFFFFF, vocabulary).long(), bias)
        changed = torch.where(added[:, :vocabulary] == 0.0, changed, changed + added[:, :vocabulary])
        penalizes = _penalizes(named)[:, None] & used
        seen = torch.where(penalizes, changes.seen[rows], 0)
        repetition = named["repetition"][:, None]
        repeated = torch.where(changed > 0, changed / repetition, changed * repetition)
        changed = torch.where(seen > 0, repeated, changed)
        produced = seen >> 1
        taken = changed - named["frequency"][:, None] * produced.float() - named["presence"][:, None]
        changed = torch.where(produced > 0, taken, changed)
        self.sample(changed, params, positions, out)
        self.report(logits, out, params[LOGPROBS], reports)
        counts = (_penalizes(named) & used[:, 0] & (out >= 0)).long() * 2
        changes.seen.view(-1).index_add_(0, rows * vocabulary + out.clamp_min(0).long(), counts.to(changes.seen.dtype))
        return changed

    def report(self, logits: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor, reports: torch.Tensor) -> None:
        """See DeviceSampler."""
        exact = logits.double()
        chosen = exact.gather(-1, tokens.clamp_min(0).long()[:, None])
        most, order = torch.sort(exact, descending=True, stable=True)
        bottom = torch.logsumexp(exact, -1)[:, None]
        ranks = (exact > chosen).sum(-1, keepdim=True) + 1
        most, order = most[:, :REPORTED], order[:, :REPORTED]
        missing = (0, REPORTED - order.shape[1])
        columns = [
            ranks.int(),
            (chosen - bottom).float().view(torch.int32),
            functional.pad(torch.where(most > -torch.inf, order, -1).int(), missing, value=-1),
            functional.pad((most - bottom).float(), missing, value=-torch.inf).view(torch.int32),
        ]
        reported = ((counts >= 0) & (tokens >= 0))[:, None]
        reports.copy_(torch.where(reported, torch.cat(columns, 1), reports))


class TritonSampler:
    """Triton kernels: one pass over the logits and a part of them again, no sorting."""

    def __init__(self, row_count: int, vocabulary: int, device: torch.device) -> None:
        """Prepares for up to `row_count` rows of `vocabulary` logits."""
        from kernels.sampling import change, choose, logprobs  # noqa: PLC0415 - triton is imported only where it is used

        self._choose, self._change, self._logprobs = choose, change, logprobs
        self._workspace = Workspace.allocate(row_count, vocabulary, device, changes=True)

    def most_likely(self, logits: torch.Tensor, out: torch.Tensor) -> None:
        """See DeviceSampler."""
        self._choose.most_likely(logits, out, self._workspace)

    def sample(self, logits: torch.Tensor, params: torch.Tensor, positions: torch.Tensor, out: torch.Tensor) -> None:
        """See DeviceSampler."""
        self._choose.sample(logits, self._choice(params), positions, out, self._workspace)

    def sample_changed(
        self,
        logits: torch.Tensor,
        changes: Changes,
        params: torch.Tensor,
        positions: torch.Tensor,
        out: torch.Tensor,
        reports: torch.Tensor,
    ) -> torch.Tensor:
        """See DeviceSampler."""
        named, room = parameters(params), self._workspace
        penalties = Penalties(named["repetition"], named["frequency"], named["presence"], named["withheld_until"])
        changed: torch.Tensor = self._change.change_logits(
            logits, changes, penalties, named["temperature"], positions, room
        )
        self._choose.sample(changed, self._choice(params), positions, out, room, scanned=True)
        self._logprobs.write_reports(logits, out, params[LOGPROBS], room.plain_heads, room.plain_masses, reports)
        self._change.note_tokens(changes.seen, changes.rows, out, penalties)
        return changed

    def report(self, logits: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor, reports: torch.Tensor) -> None:
        """See DeviceSampler."""
        self._choose.report(logits, tokens, counts, reports, self._workspace)

    def _choice(self, params: torch.Tensor) -> Choice:
        """Returns the parameters of a choice."""
        named = parameters(params)
        return Choice(**{field.name: named[field.name] for field in dataclasses.fields(Choice)})


def parameters(params: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the rows of `params` by name, floats as floats."""
    floats = params.view(torch.float32)
    return {name: (params if name in _INTEGERS else floats)[index] for index, name in enumerate(PARAMETERS)}


def _penalizes(named: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns `[row]`, whether the tokens that it has seen change its logits."""
    return (named["repetition"] != 1.0) | (named["frequency"] != 0.0) | (named["presence"] != 0.0)


def _typical(weights: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Returns the weights of the tokens that are typical, as `execsvc.sampler` has it; `[row, token]`, `[row, 1]`."""
    shares = weights / weights.sum(-1, keepdim=True)
    surprises = torch.where(shares > 0.0, -torch.log(shares), torch.inf)
    entropy = torch.where(shares > 0.0, shares * surprises, 0.0).sum(-1, keepdim=True)
    order = torch.sort((surprises - entropy).abs(), stable=True).indices
    ordered = shares.gather(-1, order)
    dropped = torch.cumsum(ordered, -1) - ordered >= mass
    return weights.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), 0.0)


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
