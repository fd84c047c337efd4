"""Poison for what a kernel must not read, and for what it must write.

A slot that no sequence has filled may hold anything: NaN or infinity there must not reach a result, not even times
zero. Keys and values are poisoned apart, because either alone must be harmless.
"""

from __future__ import annotations

import torch

GARBAGE_BLOCKS = (2**31 - 1, 10**9, -1, 2**30)
"""What the unused end of a block table may hold."""


def unused_slots(block_count: int, block_size: int, used: torch.Tensor) -> torch.Tensor:
    """Returns `[block, block_size]` bool: the slots that are not in `used`.

    Args:
        block_count: blocks of the cache.
        block_size: slots of a block.
        used: slot numbers, block * block_size + offset, any shape.
    """
    unused = torch.ones(block_count * block_size, dtype=torch.bool)
    unused[used.flatten().long()] = False
    return unused.view(block_count, block_size)


def poison_slots(cache: torch.Tensor, unused: torch.Tensor, value: float = float("nan")) -> None:
    """Writes `value` into every unused slot. Writes `cache`.

    Args:
        cache: keys or values of one layer, `[block, kv_head, block_size, head_dim]`, any strides and float type; a
            float8 without infinities gets its NaN instead.
        unused: `[block, block_size]` bool.
        value: NaN or an infinity.
    """
    if cache.dtype == torch.float8_e4m3fn:
        value = float("nan")
    fill = torch.tensor(value, dtype=torch.float32).to(cache.dtype)
    # float8 cannot be indexed on every device, its bits can.
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[cache.element_size()]
    bits = cache.view(integers)
    blocks, offsets = torch.nonzero(unused.to(cache.device), as_tuple=True)
    bits[blocks, :, offsets] = fill.view(integers).to(cache.device)


def poison_tails(tables: torch.Tensor, used_blocks: torch.Tensor) -> None:
    """Writes garbage behind each row's used entries. Writes `tables`.

    Args:
        tables: `[sequence, block_max]` int32.
        used_blocks: `[sequence]`, entries that a kernel may read.
    """
    columns = torch.arange(tables.shape[1], device=tables.device)
    garbage = torch.tensor(GARBAGE_BLOCKS, dtype=tables.dtype, device=tables.device)
    tail = columns[None, :] >= used_blocks.to(tables.device)[:, None]
    tables[tail] = garbage[columns % len(GARBAGE_BLOCKS)].expand_as(tables)[tail]


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """Returns an output full of NaN: what a kernel forgets to write is seen."""
    return torch.full(shape, float("nan"), dtype=torch.float32, device=device).to(dtype)
