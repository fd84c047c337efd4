"""Attention problems with poison wherever a kernel must not look."""

from __future__ import annotations

import dataclasses

import torch

BLOCK_SIZE = 16


@dataclasses.dataclass
class Case:
    """Queries, a cache with NaN in every unused slot, and block tables with garbage in their tails."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    query_starts: torch.Tensor
    scale: float


def make_case(
    context_lens: list[int],
    query_counts: list[int],
    dtype: torch.dtype,
    *,
    heads: tuple[int, int] = (6, 2),
    head_dim: int = 64,
    block_size: int = BLOCK_SIZE,
    seed: int = 0,
) -> Case:
    """Returns a problem.

    Args:
        context_lens: cached tokens of each sequence, its queries included.
        query_counts: queries of each sequence.
        dtype: of q and the caches.
        heads: (query heads, kv heads).
        head_dim: elements of a head.
        block_size: slots of a block.
        seed: of the content and of the order of the blocks.
    """
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    needed = [-(-length // block_size) for length in context_lens]
    block_count = sum(needed) + 3
    # One tensor with a layer and a K/V axis, as in production: the caches are strided views.
    cache = torch.full((block_count, 2, 2, num_kv_heads, block_size, head_dim), float("nan"), dtype=dtype)
    order = (torch.randperm(block_count - 1, generator=generator) + 1).tolist()
    # The tail of a table points far outside the cache: whoever reads through it finds out.
    tables = torch.full((len(context_lens), max([*needed, 1]) + 2), 2**30, dtype=torch.int32)
    for sequence, length in enumerate(context_lens):
        blocks = [order.pop() for _ in range(needed[sequence])]
        tables[sequence, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        for position in range(length):
            block, offset = blocks[position // block_size], position % block_size
            content = torch.randn(2, num_kv_heads, head_dim, generator=generator)
            cache[block, 1, :, :, offset] = content.to(dtype)
    starts = torch.tensor([0, *torch.tensor(query_counts).cumsum(0).tolist()], dtype=torch.int32)
    q = torch.randn(max(int(starts[-1]), 1), num_heads, head_dim, generator=generator).to(dtype)
    return Case(
        q=q[: int(starts[-1])],
        k_cache=cache[:, 1, 0],
        v_cache=cache[:, 1, 1],
        block_tables=tables,
        context_lens=torch.tensor(context_lens, dtype=torch.int32),
        query_starts=starts,
        scale=head_dim**-0.5,
    )
