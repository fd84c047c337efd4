"""Triton: a block is one contiguous extent, so a copy is a straight run."""

import torch

from kernels.block_copy.move import as_words, check_block_ids, move_blocks
from kernels.checks import check_dtype, check_shape


def block_copy(cache: torch.Tensor, pairs: torch.Tensor) -> None:
    """Copies blocks, all layers in one launch. Writes `cache`.

    Args:
        cache: `[block, ...]`, each block contiguous, any type.
        pairs: `[copy, 2]` int64, (source, destination). Destinations are distinct, none is a source and none is the
            null block: copies run side by side. Pairs in host memory are checked for that and moved to the device;
            pairs on the device are taken as they are.

    Raises:
        ValueError: a shape, dtype, device or layout does not fit, or pairs overlap.
    """
    check_shape("pairs", pairs, (None, 2))
    check_dtype("pairs", pairs, (torch.int64,))
    sources, destinations = pairs[:, 0], pairs[:, 1]
    check_block_ids("pairs: sources", sources, cache.shape[0], written=False)
    check_block_ids("pairs: destinations", destinations, cache.shape[0], written=True)
    if pairs.device.type == "cpu":
        both = sorted(set(sources.tolist()) & set(destinations.tolist()))
        if both:
            message = f"pairs: no block both source and destination expected, found {both}"
            raise ValueError(message)
    words = as_words("cache", cache)
    on_device = pairs.to(cache.device, non_blocking=True)
    move_blocks(words, words, on_device[:, 0], on_device[:, 1])
