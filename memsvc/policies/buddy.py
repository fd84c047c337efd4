"""A binary buddy allocator: extents whose sizes are powers of two, each aligned to its size.

An extent that is free merges with its buddy (the other half of the extent twice as large) as soon as that is free too.
A pool whose size is no power of two is a row of the largest aligned extents that fit.
"""

from __future__ import annotations

import heapq

from quire.errors import InvariantError


class BuddyAllocator:
    """Extents of a pool of `size` units; the lowest address that fits is handed out first."""

    __slots__ = ("_allocated", "_free", "_heaps", "size")

    def __init__(self, size: int) -> None:
        """Starts with everything free."""
        self.size = size
        self._allocated: dict[int, int] = {}
        orders = max(1, size.bit_length())
        self._free: list[set[int]] = [set() for _ in range(orders)]
        # Heaps find the lowest address; entries that are not in the set beside them are stale.
        self._heaps: list[list[int]] = [[] for _ in range(orders)]
        at = 0
        for order in reversed(range(orders)):
            if size >> order & 1:
                self._put(order, at)
                at += 1 << order

    def allocate(self, count: int) -> int | None:
        """Returns the start of a free extent of at least `count` units, or None if there is none."""
        wanted = max(0, count - 1).bit_length()
        order = next((order for order in range(wanted, len(self._free)) if self._free[order]), None)
        if order is None:
            return None
        start = self._take(order)
        while order > wanted:
            order -= 1
            self._put(order, start + (1 << order))
        self._allocated[start] = wanted
        return start

    def size_of(self, start: int) -> int:
        """Returns the units of the extent that was handed out at `start`."""
        return 1 << self._allocated[start]

    def free(self, start: int) -> None:
        """Takes an extent back.

        Raises:
            InvariantError: none was handed out at `start`.
        """
        order = self._allocated.pop(start, None)
        if order is None:
            raise InvariantError(f"no extent was handed out at {start}")
        while order + 1 < len(self._free):
            buddy = start ^ (1 << order)
            if buddy not in self._free[order]:
                break
            self._free[order].remove(buddy)
            start = min(start, buddy)
            order += 1
        self._put(order, start)

    def free_extents(self) -> list[tuple[int, int]]:
        """Returns (start, units) of every free extent, by address."""
        return sorted((start, 1 << order) for order, starts in enumerate(self._free) for start in starts)

    def _put(self, order: int, start: int) -> None:
        self._free[order].add(start)
        heapq.heappush(self._heaps[order], start)

    def _take(self, order: int) -> int:
        """Removes and returns the lowest free extent of `order`; there is one."""
        while True:
            start = heapq.heappop(self._heaps[order])
            if start in self._free[order]:
                self._free[order].remove(start)
                return start
