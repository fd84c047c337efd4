"""Sizes, and paged caches with content, for measurements."""

from collections.abc import Sequence
import dataclasses

import torch


@dataclasses.dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of the work; the defaults are an 8B model's."""

    rows: int = 8192
    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 16
    layers: int = 32
    batch: int = 64
    context: int = 2048
    longest: int = 32768
    """Tokens of the sequence that is decoded alone."""
    prompt: int = 8192
    turn: int = 32
    """Tokens that are added to the longest sequence at once."""
    moves: int = 64
    """Blocks that are copied at once."""
    sampled_rows: int = 256
    vocabulary: int = 128256

    def ragged_lengths(self) -> list[int]:
        """Returns lengths with the same total as an even batch: a few long ones, and many short ones."""
        weights = [1.0 / (place + 1) for place in range(self.batch)]
        spare = self.batch * self.context - self.batch
        lengths = [1 + int(spare * weight / sum(weights)) for weight in weights]
        lengths[0] += self.batch * self.context - sum(lengths)
        return lengths


TINY = Scale(
    rows=4, hidden=64, inner=64, heads=4, kv_heads=2, head_dim=64, layers=2, batch=2, context=20, longest=40,
    prompt=20, turn=3, moves=2, sampled_rows=2, vocabulary=300,
)  # fmt: skip
"""For a dry run in the interpreter."""


@dataclasses.dataclass(frozen=True, slots=True)
class PagedProblem:
    """Sequences in a paged cache, whose blocks lie in random order."""

    keys: torch.Tensor
    """`[block, kv_head, block_size, head_dim]`, a view of a cache with one layer."""
    values: torch.Tensor
    """Like `keys`."""
    tables: torch.Tensor
    """`[sequence, block_max]` int32."""
    lens: torch.Tensor
    """`[sequence]` int32."""
    lengths: tuple[int, ...]
    """The same on the host."""

    @classmethod
    def build(
        cls, scale: Scale, lengths: Sequence[int], device: torch.device, dtype: torch.dtype = torch.bfloat16
    ) -> "PagedProblem":
        """Returns sequences of these lengths, with random keys and values of `dtype`."""
        counts = [-(-length // scale.block_size) for length in lengths]
        block_count = sum(counts) + 1
        shape = (block_count, 1, 2, scale.kv_heads, scale.block_size, scale.head_dim)
        cache = torch.randn(shape, dtype=torch.bfloat16, device=device).to(dtype)
        order = (torch.randperm(block_count - 1) + 1).to(torch.int32)
        tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
        taken = 0
        for row, count in enumerate(counts):
            tables[row, :count] = order[taken : taken + count]
            taken += count
        lens = torch.tensor(list(lengths), dtype=torch.int32, device=device)
        return cls(cache[:, 0, 0], cache[:, 0, 1], tables.to(device), lens, tuple(lengths))

    @property
    def slot_count(self) -> int:
        """Slots of all blocks but the null block."""
        return (self.keys.shape[0] - 1) * self.keys.shape[2]
