"""Triton: moves blocks between places, as runs of bytes. What block_copy and block_swap launch."""

import torch
import triton
import triton.language as tl

from kernels.checks import check_dtype, check_same_device, check_shape
from kernels.configs import lookup
from kernels.layout import NULL_BLOCK


@triton.jit
def _move_blocks(
    source_ptr,
    target_ptr,
    source_index_ptr,
    target_index_ptr,
    stride_source_index,
    stride_target_index,
    stride_source: tl.int64,
    stride_target: tl.int64,
    element_count,
    SOURCE_INDEXED: tl.constexpr,
    TARGET_INDEXED: tl.constexpr,
    RUN: tl.constexpr,
):
    """Grid (run, block): a side that is not indexed holds its blocks in the order of the grid."""
    place = tl.program_id(1)
    source = place.to(tl.int64)
    target = place.to(tl.int64)
    if SOURCE_INDEXED:
        source = tl.load(source_index_ptr + place * stride_source_index).to(tl.int64)
    if TARGET_INDEXED:
        target = tl.load(target_index_ptr + place * stride_target_index).to(tl.int64)
    elements = tl.program_id(0) * RUN + tl.arange(0, RUN)
    mask = elements < element_count
    data = tl.load(source_ptr + source * stride_source + elements, mask=mask)
    tl.store(target_ptr + target * stride_target + elements, data, mask=mask)


def as_words(name: str, blocks: torch.Tensor) -> torch.Tensor:
    """Returns blocks of any type as `[block, word]`, a view of integers as wide as fits: the same kernel for all types.

    Raises:
        ValueError: a block is not contiguous.
    """
    if blocks.dim() < 2 or not blocks[:1].is_contiguous():  # noqa: PLR2004 - blocks of something
        message = f"{name}: contiguous blocks expected, found shape {list(blocks.shape)}, strides {blocks.stride()}"
        raise ValueError(message)
    flat = blocks.flatten(1)
    block_bytes = flat.shape[1] * flat.element_size()
    offset = flat.storage_offset() * flat.element_size()
    stride = flat.stride(0) * flat.element_size()
    for word in (torch.int32, torch.int16):
        if not any(size % word.itemsize for size in (block_bytes, offset, stride)):
            return flat.view(word)
    return flat.view(torch.int8)


def check_block_ids(name: str, ids: torch.Tensor, block_count: int, *, written: bool) -> None:
    """Checks block numbers that lie in host memory; those on a device are not looked at, that would wait for it.

    Args:
        name: named in messages.
        ids: `[block]`.
        block_count: blocks of the cache.
        written: whether the blocks are written: then each may occur once, and the null block not at all.

    Raises:
        ValueError: a number is outside the cache, or written twice.
    """
    check_dtype(name, ids, (torch.int32, torch.int64))
    if ids.device.type != "cpu" or ids.numel() == 0:
        return
    least = NULL_BLOCK + 1 if written else 0
    lowest, highest = (int(bound) for bound in torch.aminmax(ids))
    if lowest < least or highest >= block_count:
        found = lowest if lowest < least else highest
        message = f"{name}: blocks {least} .. {block_count - 1} expected, found {found}"
        raise ValueError(message)
    if written and len(set(ids.tolist())) != len(ids):
        message = f"{name}: each block at most once expected, found {ids.tolist()}"
        raise ValueError(message)


def move_blocks(
    source: torch.Tensor,
    target: torch.Tensor,
    source_ids: torch.Tensor | None,
    target_ids: torch.Tensor | None,
) -> None:
    """Moves blocks. Writes `target`. What the callers checked is not checked again.

    Args:
        source: `[block, word]` from `as_words`.
        target: likewise, of the same width; may be `source`.
        source_ids: `[move]`, which block each move reads; None: block i for move i.
        target_ids: `[move]`, which block each move writes; None: block i for move i.

    Raises:
        ValueError: widths or devices differ.
    """
    check_shape("target", target, (None, source.shape[1]))
    check_dtype("target", target, (source.dtype,))
    given = source_ids if source_ids is not None else target_ids
    assert given is not None, "one side is chosen by numbers"
    sides = [ids if ids is not None else given for ids in (source_ids, target_ids)]
    sides = [ids.to(source.device, non_blocking=True) for ids in sides]
    check_same_device(source=source, target=target)
    move_count, words = given.shape[0], source.shape[1]
    if move_count == 0 or words == 0:
        return
    config = lookup("block_move", source.device)
    run = min(config["elements"], triton.next_power_of_2(words))
    _move_blocks[(triton.cdiv(words, run), move_count)](
        source, target, sides[0], sides[1], sides[0].stride(0), sides[1].stride(0),
        source.stride(0), target.stride(0), words,
        SOURCE_INDEXED=source_ids is not None, TARGET_INDEXED=target_ids is not None, RUN=run,
        num_warps=config["num_warps"],
    )  # fmt: skip
