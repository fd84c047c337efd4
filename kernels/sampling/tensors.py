"""The tensors that the sampling kernels work on."""

import dataclasses

import torch

RUN = 64
"""Logits that share one summary. A power of two."""
CANDIDATES = 1024
"""Room for likely tokens of a row, which one program holds in registers. A power of two."""


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """How to choose, a row each; all on the device. The order is temperature, top_k, top_p, min_p."""

    temperature: torch.Tensor
    """`[row]` float32; 0 takes the most likely token, and then the rest has no effect."""
    top_k: torch.Tensor
    """`[row]` int32: keep this many most likely tokens; 0 keeps all."""
    top_p: torch.Tensor
    """`[row]` float32: keep the most likely tokens whose probabilities reach this sum; 1 keeps all."""
    min_p: torch.Tensor
    """`[row]` float32: drop tokens less likely than this times the most likely one; 0 drops none."""
    seed_low: torch.Tensor
    """`[row]` int32: low word of the key of the draws."""
    seed_high: torch.Tensor
    """`[row]` int32: high word."""

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All of them by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True, slots=True)
class Workspace:
    """What the kernels leave for each other; never read by anyone else."""

    heads: torch.Tensor
    """`[row, run]` float32: the largest logit of each run."""
    masses: torch.Tensor
    """`[row, run]` float32: sum of exp((logit - head) / temperature)."""
    plain_masses: torch.Tensor
    """The same without temperature, for log-probabilities."""
    values: torch.Tensor
    """`[row, candidate]` float32."""
    tokens: torch.Tensor
    """`[row, candidate]` int32."""

    @classmethod
    def allocate(cls, row_count: int, vocabulary: int, device: torch.device) -> "Workspace":
        """Returns a workspace for up to `row_count` rows of `vocabulary` logits."""
        runs = torch.empty(3, row_count, -(-vocabulary // RUN), dtype=torch.float32, device=device)
        values = torch.empty(row_count, CANDIDATES, dtype=torch.float32, device=device)
        return cls(runs[0], runs[1], runs[2], values, torch.empty_like(values, dtype=torch.int32))


@dataclasses.dataclass(frozen=True, slots=True)
class LogProbabilities:
    """Where log-probabilities go: natural logarithms, of the logits as they are given, without temperature."""

    chosen: torch.Tensor
    """`[row]` float32: of the token chosen; NaN where there is none."""
    top_tokens: torch.Tensor
    """`[row, top]` int32: the most likely tokens, most likely first; -1 where the vocabulary has no more."""
    top: torch.Tensor
    """`[row, top]` float32: theirs."""

    @classmethod
    def allocate(cls, row_count: int, top_count: int, device: torch.device) -> "LogProbabilities":
        """Returns room for `top_count` (0: only the chosen one) tokens a row."""
        chosen = torch.empty(row_count, dtype=torch.float32, device=device)
        tokens = torch.empty(row_count, top_count, dtype=torch.int32, device=device)
        return cls(chosen, tokens, torch.empty_like(tokens, dtype=torch.float32))
