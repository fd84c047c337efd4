"""Triton: a block is one contiguous extent, so a copy is a straight run."""

import torch
import triton
import triton.language as tl

from kernels.checks import check_dtype, check_same_device, check_shape

_RUN = 4096


@triton.jit
def _block_copy(cache_ptr, pair_ptr, block_elements: tl.int64, RUN: tl.constexpr):
    """Grid (run, copy)."""
    run = tl.program_id(0)
    pair = tl.program_id(1)
    source = tl.load(pair_ptr + 2 * pair)
    destination = tl.load(pair_ptr + 2 * pair + 1)
    elements = run.to(tl.int64) * RUN + tl.arange(0, RUN)
    mask = elements < block_elements
    data = tl.load(cache_ptr + source * block_elements + elements, mask=mask)
    tl.store(cache_ptr + destination * block_elements + elements, data, mask=mask)


def block_copy(cache: torch.Tensor, pairs: torch.Tensor) -> None:
    """Copies blocks. Writes `cache`.

    Args:
        cache: `[block, ...]`, contiguous.
        pairs: `[copy, 2]` int64, contiguous, (source, destination). Destinations are distinct, and none is a source:
            copies run side by side.

    Raises:
        ValueError: a shape, dtype, device or layout does not fit.
    """
    check_shape("pairs", pairs, (None, 2))
    check_dtype("pairs", pairs, (torch.int64,))
    check_same_device(cache=cache, pairs=pairs)
    if not cache.is_contiguous() or not pairs.is_contiguous():
        message = "cache, pairs: contiguous tensors expected"
        raise ValueError(message)
    if pairs.shape[0] == 0:
        return
    block_elements = cache[0].numel()
    _block_copy[(triton.cdiv(block_elements, _RUN), pairs.shape[0])](
        cache, pairs, block_elements, RUN=_RUN, num_warps=4
    )
