"""Host memory to which blocks of the KV cache are swapped out, and from which they come back.

A block is one contiguous extent of the cache and a slot one of host memory, so neighbours move in one transfer.
Transfers are ordered with the steps: what a plan swaps out is read before its step writes, what it swaps in is there
before its step reads. Which block goes where is decided by whoever sends plans.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from execsvc.kv_cache import KVCache
from quire.errors import InvalidRequestError

Pairs = npt.NDArray[np.int64]

_NOBODY = -1


class SwapSpace:
    """Slots of the size of a block; page-locked where the cache is on a GPU. One thread calls."""

    def __init__(self, cache: KVCache, slot_count: int) -> None:
        """Allocates `slot_count` slots for blocks of `cache`."""
        shape = (slot_count, *cache.layout.shape[1:])
        self.slot_count = slot_count
        self._cache = cache
        self._slots = torch.zeros(shape, dtype=cache.layout.dtype, pin_memory=cache.device.type == "cuda")
        self._owners = np.full(slot_count, _NOBODY, dtype=np.int64)

    def check(self, swap_out: Pairs, swap_in: Pairs, copies: Pairs, owner: int) -> None:
        """Checks what a plan of stream `owner` moves: `[pair, 2]` each.

        Raises:
            InvalidRequestError: a block or slot is out of range or written twice, a slot holds nothing of this stream,
                or the order within the plan would matter.
        """
        last_block = self._cache.layout.block_count - 1
        for name, blocks, slots in (("swap_out", *swap_out.T), ("swap_in", *swap_in.T[::-1])):
            if len(blocks) and not 1 <= blocks.min() <= blocks.max() <= last_block:
                raise InvalidRequestError(f"{name}: a block is out of range, allowed is 1 .. {last_block}", field=name)
            if len(slots) and slots.max() >= self.slot_count:
                message = f"{name}: slot {slots.max()} is out of range, there are {self.slot_count}; see --swap-space"
                raise InvalidRequestError(message, field=name)
        if len(np.unique(swap_out[:, 1])) != len(swap_out):
            raise InvalidRequestError("swap_out: a slot is written twice", field="swap_out")
        if len(np.unique(swap_in[:, 1])) != len(swap_in) or np.isin(swap_in[:, 1], copies).any():
            raise InvalidRequestError("swap_in: a block is written twice, or copied in the same step", field="swap_in")
        strange = (self._owners[swap_in[:, 0]] != owner) | np.isin(swap_in[:, 0], swap_out[:, 1])
        if strange.any():
            message = (
                f"swap_in: slot {swap_in[strange][0, 0]} holds nothing that a plan of this stream before put there"
            )
            raise InvalidRequestError(message, field="swap_in")

    @torch.inference_mode()
    def move_out(self, pairs: Pairs, owner: int) -> None:
        """Copies blocks to slots: checked (block, slot) pairs of stream `owner`. The host does not wait."""
        for block, slot, count in _runs(pairs):
            self._slots[slot : slot + count].copy_(self._cache.data[block : block + count], non_blocking=True)
        self._owners[pairs[:, 1]] = owner

    @torch.inference_mode()
    def move_in(self, pairs: Pairs) -> None:
        """Copies slots to blocks: checked (slot, block) pairs. The host does not wait. Writes the cache."""
        for slot, block, count in _runs(pairs):
            self._cache.data[block : block + count].copy_(self._slots[slot : slot + count], non_blocking=True)

    def forget(self, owner: int | None = None) -> None:
        """Makes slots hold nothing: those of one stream, or all."""
        self._owners[slice(None) if owner is None else self._owners == owner] = _NOBODY


def _runs(pairs: Pairs) -> Iterator[tuple[int, int, int]]:
    """Yields (first source, first destination, count) of neighbours that move together."""
    ordered = pairs[np.argsort(pairs[:, 0], kind="stable")]
    breaks = np.flatnonzero((np.diff(ordered, axis=0) != 1).any(1)) + 1
    for run in np.split(ordered, breaks):
        if len(run):
            yield int(run[0, 0]), int(run[0, 1]), len(run)
