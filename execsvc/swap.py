"""Host memory to which blocks of the KV cache are swapped out, and from which they come back.

A block is one contiguous extent of the cache and goes to one of host memory, so neighbours move in one transfer.
Transfers are ordered with the steps: what a plan swaps out is read before its step writes, what it swaps in is there
before its step reads. Which block goes where is decided by whoever sends plans.

Every stream of plans numbers its slots by itself; a slot has an extent as long as it holds something. So streams share
what extents there are without knowing of each other, and none can read what another one put away.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import heapq
import statistics
import time
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from execsvc.kv_cache import KVCache
from quire.errors import InvalidRequestError

Pairs = npt.NDArray[np.int64]

_MEASURED_BYTES: Final = 64 << 20
_MEASURED_ROUNDS: Final = 3


class SwapSpace:
    """Places of the size of a block; page-locked where the cache is on a GPU. One thread calls."""

    def __init__(self, cache: KVCache, slot_count: int) -> None:
        """Allocates `slot_count` extents for blocks of `cache`."""
        shape = (slot_count, *cache.layout.shape[1:])
        self.slot_count = slot_count
        self._cache = cache
        self._content = torch.empty(shape, dtype=cache.layout.dtype, pin_memory=cache.device.type == "cuda")
        # So that the pages exist before the first transfer.
        self._content.zero_()
        self._free = list(range(slot_count))
        self._extents: dict[int, dict[int, int]] = {}

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
        extents = self._extents.get(owner, {})
        written = set(swap_out[:, 1].tolist())
        for slot in swap_in[:, 0].tolist():
            if slot not in extents or slot in written:
                message = f"swap_in: slot {slot} holds nothing that a plan of this stream before put there"
                raise InvalidRequestError(message, field="swap_in")

    @torch.inference_mode()
    def move_out(self, pairs: Pairs, owner: int) -> list[int]:
        """Copies blocks to slots: checked (block, slot) pairs of stream `owner`. The host does not wait.

        Returns:
            The slots for which no extent was left; they hold nothing.
        """
        extents, refused, moves = self._extents.setdefault(owner, {}), [], []
        for block, slot in pairs.tolist():
            if slot not in extents:
                if not self._free:
                    refused.append(slot)
                    continue
                extents[slot] = heapq.heappop(self._free)
            moves.append((block, extents[slot]))
        for block, extent, count in _runs(moves):
            self._content[extent : extent + count].copy_(self._cache.data[block : block + count], non_blocking=True)
        return refused

    @torch.inference_mode()
    def move_in(self, pairs: Pairs, owner: int) -> None:
        """Copies slots to blocks: checked (slot, block) pairs. The host does not wait. Writes the cache."""
        extents = self._extents.get(owner, {})
        for extent, block, count in _runs([(extents[slot], block) for slot, block in pairs.tolist()]):
            self._cache.data[block : block + count].copy_(self._content[extent : extent + count], non_blocking=True)

    def free(self, slots: Iterable[int], owner: int) -> None:
        """Makes slots of one stream hold nothing. Transfers that read them are ordered before any that follows."""
        extents = self._extents.get(owner, {})
        for slot in slots:
            if slot in extents:
                heapq.heappush(self._free, extents.pop(slot))

    def forget(self, owner: int | None = None) -> None:
        """Makes slots hold nothing: those of one stream, or all."""
        for stream in list(self._extents) if owner is None else [owner]:
            for extent in self._extents.pop(stream, {}).values():
                heapq.heappush(self._free, extent)

    def held_elsewhere(self, owner: int) -> int:
        """Returns how many slots others than `owner` hold."""
        return self.slot_count - len(self._free) - len(self._extents.get(owner, {}))

    def measure(self) -> tuple[int, int]:
        """Returns the bytes that move out and in within a second, one block after the other; (0, 0) without slots.

        Every block gets back what it held. Call before the first plan.
        """
        block_bytes = self._cache.data[0].nbytes
        count = min(self.slot_count, self._cache.layout.block_count - 1, max(1, _MEASURED_BYTES // block_bytes))
        if not count:
            return 0, 0
        # In opposite orders, so that no two neighbours move together: blocks of a full pool lie anywhere.
        blocks, slots = np.arange(1, count + 1), np.arange(count)[::-1]
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(_MEASURED_ROUNDS):
            times = [self._now()]
            self.move_out(np.stack((blocks, slots), axis=1), 0)
            times.append(self._now())
            self.move_in(np.stack((slots, blocks), axis=1), 0)
            times.append(self._now())
            seconds[0].append(times[1] - times[0])
            seconds[1].append(times[2] - times[1])
        self.forget()
        out, back = (max(1, int(count * block_bytes / statistics.median(values))) for values in seconds)
        return out, back

    def _now(self) -> float:
        """Returns the time at which everything that was launched is done."""
        if self._cache.device.type == "cuda":
            torch.cuda.synchronize(self._cache.device)
        return time.perf_counter()


def _runs(pairs: list[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Yields (first source, first destination, count) of neighbours that move together."""
    first = last = (-1, -1)
    count = 0
    for pair in sorted(pairs):
        if count and pair == (last[0] + 1, last[1] + 1):
            count += 1
        else:
            if count:
                yield *first, count
            first, count = pair, 1
        last = pair
    if count:
        yield *first, count
