"""The growth lease of one pool: a small private stock of free blocks, so that no step waits for the memory service."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from quire.units import div_ceil

if TYPE_CHECKING:
    from gateway.core.sequence import Sequence

_POOL_SHARE: Final = 100
"""The stock is at most 1/100 of the pool ..."""
_STEPS_AT_LEAST: Final = 4
"""... unless that is less than what the next steps need."""


class GrowthLease:
    """Blocks granted and not yet in a table.

    `take` is what a step does; `shortfall` says how many blocks to ask for; asking is the caller's.

    The stock is what running sequences need within some steps, which is known: each needs a block when the last one of
    its own is full. It is filled up when half of these steps are over, or half of the blocks used.

    Args:
        usable_block_count: blocks of the pool.
        block_size: tokens in a block; no sequence needs two blocks within so many steps.
    """

    __slots__ = (
        "_cap",
        "_demand",
        "_look_at",
        "_low",
        "_size",
        "_stock",
        "exhausted",
        "granted_total",
        "refilling",
        "sparing",
    )

    def __init__(self, usable_block_count: int, block_size: int = 16) -> None:
        self._cap = max(1, usable_block_count // _POOL_SHARE)
        self._size = block_size
        self._stock: list[int] = []
        self._demand = 0
        # Needs are looked at when the stock is down to so many blocks, or in this step.
        self._low = 0
        self._look_at = 0
        self.granted_total = 0
        self.refilling = False
        self.exhausted = False
        """The last refill brought nothing: the pool is short until blocks come back."""
        self.sparing = False
        """Only what was noted as demand is to be asked for: blocks cost others theirs."""

    def __len__(self) -> int:
        """Blocks in stock."""
        return len(self._stock)

    def take(self) -> int | None:
        """Takes one block, or None when there is none."""
        return self._stock.pop() if self._stock else None

    def note_demand(self, unmet: int) -> None:
        """Remembers how many blocks the last step wanted and did not get."""
        self._demand = unmet

    def shortfall(self, rooms: Iterable[int], step_no: int) -> int:
        """Returns how many blocks to ask for now: 0 while the stock is not low or a refill is under way.

        Args:
            rooms: of each running sequence, the tokens that still fit into its blocks; read only now and then.
            step_no: steps planned so far.
        """
        if self.refilling:
            return 0
        if self.sparing:
            return max(0, self._demand - len(self._stock))
        if len(self._stock) > self._low and not self._demand and step_no < self._look_at:
            return 0
        target, steps = self._needed(rooms)
        self._low = target // 2
        self._look_at = step_no + steps // 2
        missing = target - len(self._stock) if len(self._stock) <= self._low else 0
        return max(missing, self._demand)

    def _needed(self, rooms: Iterable[int]) -> tuple[int, int]:
        """Returns how many blocks are needed within how many steps: as many as the cap allows, or the fewest."""
        needs = [0] * (self._size + 1)
        for room in rooms:
            needs[min(room, self._size)] += 1
        total = 0
        for steps, count in enumerate(needs[: self._size]):
            if steps >= _STEPS_AT_LEAST and total + count > self._cap:
                return total, steps
            total += count
        return total, self._size

    def demand_ahead(self, unmet: int, prefills: Iterable[Sequence], budget: int) -> int:
        """Returns how many blocks are wanted beyond those in stock where admissions do not bring a whole prompt's.

        Args:
            unmet: blocks that the last step wanted and did not get.
            prefills: who computes a prompt, the first first: the next step's chunks want blocks as well.
            budget: tokens of a step.
        """
        wanted = unmet
        for sequence in prefills:
            count = min(sequence.total - sequence.scheduled, budget)
            wanted += max(0, div_ceil(sequence.scheduled + count - sequence.room, self._size))
            budget -= count
        return max(0, wanted - len(self._stock))

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
