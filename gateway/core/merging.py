"""Block tables that follow when equal blocks become one.

memsvc offers a table the block that holds what one of its own holds already. The next step has the executor's table
name it; when that step is done nothing reads the old block any more, and memsvc is told, which frees it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from gateway.core.sequence import SequenceState

if TYPE_CHECKING:
    from gateway.core.sequence import Sequence


class TableMerges:
    """The offers of one pool that are still to be taken up, and those in steps under way."""

    def __init__(self) -> None:
        """Starts with no offer."""
        self._offers: dict[int, dict[int, int]] = {}
        self._in_flight: dict[int, list[int]] = {}

    def __bool__(self) -> bool:
        """Whether an offer is to be taken up."""
        return bool(self._offers)

    def offer(self, rows: Iterable[tuple[int, int, int]]) -> None:
        """Takes in offers: (table, index, block that may take the place of the one there)."""
        for table, index, block in rows:
            self._offers.setdefault(table, {})[index] = block

    def plan(self, step: int, sequences: Iterable[Sequence]) -> list[int]:
        """Returns what step `step` changes in the tables of `sequences`: (table, index, block) flat.

        Offers to others are dropped: their tables are closing, and memsvc ends the offers with them.
        """
        rows: list[int] = []
        for sequence in sequences:
            offers = self._offers.get(sequence.table, {}) if sequence.state is SequenceState.RUNNING else {}
            for index, block in offers.items():
                # What the window has left meanwhile is released, and so is the offer.
                if index >= sequence.released:
                    sequence.blocks[index] = block
                    rows += (sequence.table, index, block)
        self._offers.clear()
        if rows:
            self._in_flight[step] = rows
        return rows

    def done(self, step: int) -> list[int]:
        """Returns what `plan` returned for a step whose result has come."""
        return self._in_flight.pop(step, [])

    def clear(self) -> None:
        """Forgets everything: the tables are void."""
        self._offers.clear()
        self._in_flight.clear()
