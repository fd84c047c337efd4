"""The rows and the growth of a journal, as they are once their tables are found."""

from __future__ import annotations

import dataclasses

import numpy as np

from memsvc.core.journal import Column
from memsvc.core.table import Slots, TableColumns
from quire.errors import StaleEpochError


@dataclasses.dataclass(slots=True)
class Rows:
    """Rows of open tables, each table once."""

    slots: Slots
    starts: Column
    counts: Column
    offsets: Column
    written: Column
    tokens: Column


@dataclasses.dataclass(frozen=True, slots=True)
class Growth:
    """New blocks of tables, in the order in which each table gets them."""

    slots: Slots
    blocks: Column

    def counts(self) -> dict[int, int]:
        """Returns how many blocks each slot gets."""
        counts: dict[int, int] = {}
        for slot in self.slots.tolist():
            counts[slot] = counts.get(slot, 0) + 1
        return counts


NO_GROWTH = Growth(np.zeros(0, np.int64), np.zeros(0, np.int64))


def merged(rows: Rows, tables: TableColumns) -> Rows:
    """Returns `rows` with those of one table joined into one, in their order.

    Raises:
        StaleEpochError: they leave a gap, overlap, or their written counts fall.
    """
    merged: dict[int, tuple[int, list[int], int]] = {}
    for at, slot in enumerate(rows.slots.tolist()):
        start, written, offset = int(rows.starts[at]), int(rows.written[at]), int(rows.offsets[at])
        tokens = rows.tokens[offset : offset + int(rows.counts[at])].tolist()
        if slot not in merged:
            merged[slot] = (start, tokens, written)
            continue
        first, known, before = merged[slot]
        if not known:
            first = start
        if (tokens and start != first + len(known)) or written < before:
            message = f"tables: rows of table {int(tables.counter[slot])} do not follow one another"
            raise StaleEpochError(message, reason="ROW_MISMATCH", field="tables")
        merged[slot] = (first, known + tokens, written)
    counts = np.array([len(tokens) for _, tokens, _ in merged.values()], np.int64)
    return Rows(
        slots=np.array(list(merged), np.int64),
        starts=np.array([start for start, _, _ in merged.values()], np.int64),
        counts=counts,
        offsets=counts.cumsum() - counts,
        written=np.array([written for _, _, written in merged.values()], np.int64),
        tokens=np.array([token for _, tokens, _ in merged.values() for token in tokens], np.int64),
    )
