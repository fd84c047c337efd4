"""Plain torch: what every faster block_copy must equal, bit for bit."""

import torch


def block_copy(cache: torch.Tensor, pairs: torch.Tensor) -> None:
    """Copies blocks: every source is read before any destination is written. Writes `cache`.

    Args:
        cache: `[block, ...]`.
        pairs: `[copy, 2]` int64, (source, destination); destinations are distinct.
    """
    cache.index_copy_(0, pairs[:, 1], cache.index_select(0, pairs[:, 0]))
