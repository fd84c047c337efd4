"""Triton: shares out the tiles of a ragged batch evenly, on the device, before any attention kernel runs.

A sequence's visible context is cut into units, and the units of all sequences are put in a row:

    sequence      0           1   2               3
    unit        | 0 1 2 3 4 | 5 | 6 7 8 9 10 11 | 12 13 |
    worker      |-- 0 --|--- 1 ----|---- 2 ----|-- 3 --|      share = ceil(units / workers)

Worker w takes units [w * share, (w + 1) * share), whoever's they are. The grid is fixed and the host knows nothing of
the lengths, so the launch can be part of a CUDA graph. Source: "Stream-K" (Osama et al., 2023) and "LeanAttention"
(Sanovar et al., 2024) share out work like this.
"""

import dataclasses

import torch
import triton
import triton.language as tl

_ITEMS = 256
"""Sequences looked at in one go."""
_WORKERS = 8
"""Workers whose first sequence one program finds."""


@triton.jit
def _unit_counts(ends_ptr, starts_ptr, items, item_count, WINDOW, HAS_STARTS: tl.constexpr, TILE, UNIT):
    """Returns how many units the context of each item has; 0 for an empty one."""
    inside = items < item_count
    ends = tl.load(ends_ptr + items, mask=inside, other=0)
    first_tiles = tl.zeros_like(ends)
    if WINDOW > 0:
        first_tiles = tl.maximum(ends - WINDOW, 0) // TILE
    if HAS_STARTS:
        first_tiles = tl.maximum(first_tiles, tl.load(starts_ptr + items, mask=inside, other=0) // TILE)
    tiles = tl.maximum((ends + TILE - 1) // TILE - first_tiles, 0)
    return (tiles + UNIT - 1) // UNIT


@triton.jit(do_not_specialize=["item_count", "workers"])
def _partition(
    ends_ptr,
    starts_ptr,
    offsets_ptr,
    first_item_ptr,
    item_count,
    workers,
    WINDOW: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    TILE: tl.constexpr,
    UNIT: tl.constexpr,
    ITEMS: tl.constexpr,
    WORKERS: tl.constexpr,
):
    """Grid (ceil(workers / WORKERS)): a program finds the first items of WORKERS workers; the first writes offsets."""
    program = tl.program_id(0)
    lanes = tl.arange(0, ITEMS)
    total = 0
    for first in range(0, item_count, ITEMS):
        counts = _unit_counts(ends_ptr, starts_ptr, first + lanes, item_count, WINDOW, HAS_STARTS, TILE, UNIT)
        total += tl.sum(counts, 0)
    share = tl.cdiv(total, workers)
    worker = program * WORKERS + tl.arange(0, WORKERS)
    found = tl.zeros([WORKERS], tl.int32)
    before = 0
    for first in range(0, item_count, ITEMS):
        items = first + lanes
        counts = _unit_counts(ends_ptr, starts_ptr, items, item_count, WINDOW, HAS_STARTS, TILE, UNIT)
        ends = before + tl.cumsum(counts, 0)
        inside = items < item_count
        passed = (ends[None, :] <= (worker * share)[:, None]) & inside[None, :]
        found += tl.sum(passed.to(tl.int32), 1)
        if program == 0:
            tl.store(offsets_ptr + 1 + items, ends, mask=inside)
        before += tl.sum(counts, 0)
    if program == 0:
        tl.store(offsets_ptr, 0)
    tl.store(first_item_ptr + worker, found, mask=worker < workers)


@dataclasses.dataclass(frozen=True, slots=True)
class Partition:
    """Who computes what. Written by `refresh`, read by the attention kernels."""

    tile: int
    """Positions of a tile."""
    unit: int
    """Tiles of a unit."""
    workers: int
    """Programs per kv head."""
    window: int
    """The window that it is for."""
    offsets: torch.Tensor
    """`[item_max + 1]` int32: the first unit of each item; the last entry in use is the number of units."""
    first_items: torch.Tensor
    """`[worker]` int32: where each worker begins."""

    @classmethod
    def allocate(
        cls, item_max: int, workers: int, tile: int, unit: int, window: int, device: torch.device
    ) -> "Partition":
        """Returns an unwritten partition of up to `item_max` items among `workers`."""
        offsets = torch.zeros(item_max + 1, dtype=torch.int32, device=device)
        return cls(tile, unit, workers, window, offsets, torch.zeros(workers, dtype=torch.int32, device=device))

    def refresh(self, ends: torch.Tensor, starts: torch.Tensor | None = None) -> None:
        """Shares out contexts anew. Writes `offsets` and `first_items`, on the device alone.

        Args:
            ends: `[item]` int32, where each item's context ends; 0 for an item that is padding.
            starts: `[item]` int32, positions before which an item sees nothing; None for none.
        """
        _partition[(triton.cdiv(self.workers, _WORKERS),)](
            ends, ends if starts is None else starts, self.offsets, self.first_items, ends.shape[0], self.workers,
            WINDOW=self.window, HAS_STARTS=starts is not None, TILE=self.tile, UNIT=self.unit, ITEMS=_ITEMS,
            WORKERS=_WORKERS, num_warps=4,
        )  # fmt: skip
