"""Triton: the kernel that copies blocks, with one side in order."""

import torch

from kernels.block_copy.move import as_words, check_block_ids, move_blocks
from kernels.checks import check_dtype, check_shape


def gather_blocks(cache: torch.Tensor, blocks: torch.Tensor, staging: torch.Tensor) -> None:
    """Copies block `blocks[i]` of `cache` to place i of `staging`. Writes `staging`.

    Args:
        cache: `[block, ...]`, each block contiguous, any type.
        blocks: `[move]` int32 or int64, on the device or in host memory (then they are checked).
        staging: `[place, ...]` with at least as many places as moves, blocks like the cache's, same device.

    Raises:
        ValueError: a shape, dtype, device or layout does not fit, or a block is outside the cache.
    """
    cache_words, staging_words = _checked(cache, blocks, staging)
    check_block_ids("blocks", blocks, cache.shape[0], written=False)
    move_blocks(cache_words, staging_words, blocks, None)


def scatter_blocks(staging: torch.Tensor, cache: torch.Tensor, blocks: torch.Tensor) -> None:
    """Copies place i of `staging` to block `blocks[i]` of `cache`. Writes `cache`.

    Args:
        staging: `[place, ...]` with at least as many places as moves, blocks like the cache's, same device.
        cache: `[block, ...]`, each block contiguous, any type.
        blocks: `[move]` int32 or int64, each at most once and none the null block, on the device or in host memory
            (then they are checked).

    Raises:
        ValueError: a shape, dtype, device or layout does not fit, a block is outside the cache or written twice.
    """
    cache_words, staging_words = _checked(cache, blocks, staging)
    check_block_ids("blocks", blocks, cache.shape[0], written=True)
    move_blocks(staging_words, cache_words, None, blocks)


def _checked(cache: torch.Tensor, blocks: torch.Tensor, staging: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks what both directions share, and returns cache and staging as words."""
    check_shape("blocks", blocks, (None,))
    check_shape("staging", staging, (None, *cache.shape[1:]))
    check_dtype("staging", staging, (cache.dtype,))
    if staging.shape[0] < blocks.shape[0]:
        message = f"staging: at least {blocks.shape[0]} places expected, found {staging.shape[0]}"
        raise ValueError(message)
    return as_words("cache", cache), as_words("staging", staging)
