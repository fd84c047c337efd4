"""Plain torch: what every faster block_swap must equal, bit for bit."""

import torch


def gather_blocks(cache: torch.Tensor, blocks: torch.Tensor, staging: torch.Tensor) -> None:
    """Copies block `blocks[i]` of `cache` to place i of `staging`. Writes `staging`."""
    staging[: len(blocks)] = cache[blocks.long()]


def scatter_blocks(staging: torch.Tensor, cache: torch.Tensor, blocks: torch.Tensor) -> None:
    """Copies place i of `staging` to block `blocks[i]` of `cache`. Writes `cache`."""
    cache[blocks.long()] = staging[: len(blocks)]
