"""The growth lease of one pool: a small private stock of free blocks, so that no step waits for the memory service."""

from __future__ import annotations

_POOL_SHARE = 100
"""The stock is at most 1/100 of the pool ..."""
_LEAST_CAP = 32
"""... but may always be this large ..."""
_SMALL_POOL_SHARE = 8
"""... unless that is more than 1/8 of a small pool."""


class GrowthLease:
    """Blocks granted and not yet in a table.

    `take` is what a step does; `shortfall` says how many blocks to ask for; asking is the caller's.
    """

    def __init__(self, usable_block_count: int) -> None:
        """Starts empty for a pool of so many blocks."""
        self._cap = max(
            1, min(max(usable_block_count // _POOL_SHARE, _LEAST_CAP), usable_block_count // _SMALL_POOL_SHARE)
        )
        self._stock: list[int] = []
        self._demand = 0
        self.granted_total = 0
        self.refilling = False
        self.exhausted = False
        """The last refill brought nothing: the pool is short until blocks come back."""

    def __len__(self) -> int:
        """Blocks in stock."""
        return len(self._stock)

    def take(self) -> int | None:
        """Takes one block, or None when there is none."""
        return self._stock.pop() if self._stock else None

    def note_demand(self, unmet: int) -> None:
        """Remembers how many blocks the last step wanted and did not get."""
        self._demand = unmet

    def shortfall(self, running_count: int) -> int:
        """Returns how many blocks to ask for now: 0 while the stock is more than half full or a refill is under way.

        Args:
            running_count: sequences that grow; each needs a block every block_size steps.
        """
        if self.refilling or running_count == 0:
            return 0
        target = max(1, min(running_count, self._cap))
        missing = 0 if len(self._stock) * 2 > target else target - len(self._stock)
        return max(missing, self._demand)

    def refilled(self, blocks: list[int], asked: int) -> None:
        """Takes in a refill that asked for `asked` blocks."""
        self.refilling = False
        self.granted_total += len(blocks)
        # Pop takes from the end: keep ascending order for those who read block tables.
        self._stock = blocks[::-1] + self._stock
        self._demand = max(0, self._demand - len(blocks))
        self.exhausted = asked > 0 and not blocks

    def surrender(self, count: int | None = None) -> list[int]:
        """Gives up `count` blocks (all by default), those last in line, and returns them."""
        cut = len(self._stock) if count is None else min(count, len(self._stock))
        given, self._stock = self._stock[:cut], self._stock[cut:]
        return given
