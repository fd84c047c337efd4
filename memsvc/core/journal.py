"""A journal as columns, and what each of its rows may say."""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from quire import columns
from quire.errors import InvalidRequestError

Column = npt.NDArray[np.int64]
_EMPTY: Column = np.zeros(0, np.int64)
_EMPTY_TRIPLES: Column = np.zeros((0, 3), np.int64)
_CLOSE_REASON_MAXIMUM = 5


@dataclasses.dataclass(frozen=True, slots=True)
class JournalColumns:
    """What happened to tables of one pool; see `quire.memsvc.v1.Journal`. Values are those of u32.

    Attributes:
        tables: `[row]` tables that advanced.
        token_starts: `[row]` position of the row's first token.
        token_counts: `[row]` how many of `token_ids` belong to the row.
        written_counts: `[row]` tokens confirmed as written.
        token_ids: `[token]` row after row.
        appended: `[growth, 3]` table, index, block.
        closed: `[close]` tables.
        close_reasons: `[close]` CloseReason of each.
        returned: `[block]` leased blocks given back.
        replaced: `[entry, 3]` table, index, block that takes the place of the one there.
    """

    tables: Column = dataclasses.field(default_factory=lambda: _EMPTY)
    token_starts: Column = dataclasses.field(default_factory=lambda: _EMPTY)
    token_counts: Column = dataclasses.field(default_factory=lambda: _EMPTY)
    written_counts: Column = dataclasses.field(default_factory=lambda: _EMPTY)
    token_ids: Column = dataclasses.field(default_factory=lambda: _EMPTY)
    appended: Column = dataclasses.field(default_factory=lambda: _EMPTY_TRIPLES)
    closed: Column = dataclasses.field(default_factory=lambda: _EMPTY)
    close_reasons: Column = dataclasses.field(default_factory=lambda: _EMPTY)
    returned: Column = dataclasses.field(default_factory=lambda: _EMPTY)
    replaced: Column = dataclasses.field(default_factory=lambda: _EMPTY_TRIPLES)

    def columns(self) -> JournalColumns:
        """Returns this journal."""
        return self

    def check(self) -> None:
        """Raises InvalidRequestError if the columns do not fit one another."""
        rows = len(self.tables)
        for name in ("token_starts", "token_counts", "written_counts"):
            if len(getattr(self, name)) != rows:
                message = f"{name}: {len(getattr(self, name))} rows, expected {rows} as in tables"
                raise InvalidRequestError(message, field=name)
        token_count = int(self.token_counts.sum())
        if token_count != len(self.token_ids):
            message = f"token_ids: {len(self.token_ids)} tokens, expected {token_count}, the sum of token_counts"
            raise InvalidRequestError(message, field="token_ids")
        if len(self.closed) != len(self.close_reasons):
            message = f"close_reasons: {len(self.close_reasons)} rows, expected {len(self.closed)} as in closed"
            raise InvalidRequestError(message, field="close_reasons")
        if len(self.close_reasons):
            low, high = int(self.close_reasons.min()), int(self.close_reasons.max())
            if low < 1 or high > _CLOSE_REASON_MAXIMUM:
                message = f"close_reasons: found {low if low < 1 else high}, allowed are 1 .. {_CLOSE_REASON_MAXIMUM}"
                raise InvalidRequestError(message, field="close_reasons")


# Not frozen, which would triple what it costs to make one; nothing ever changes it.
@dataclasses.dataclass(slots=True)
class PackedJournal:
    """A journal as it travels: each column of `JournalColumns` as packed little-endian u32.

    The accelerator reads it as it is, and most journals are never made into anything else.
    """

    tables: bytes = b""
    token_starts: bytes = b""
    token_counts: bytes = b""
    written_counts: bytes = b""
    token_ids: bytes = b""
    appended: bytes = b""
    closed: bytes = b""
    close_reasons: bytes = b""
    returned: bytes = b""
    replaced: bytes = b""

    def check_length(self) -> None:
        """Raises InvalidRequestError if a column is not whole rows of u32."""
        for name in COLUMNS:
            columns.check(getattr(self, name), name, row_length=3 if name in _TRIPLES else 1)

    def columns(self) -> JournalColumns:
        """Returns the same journal in columns of int64, in which sums do not overflow."""
        return JournalColumns(
            tables=_widened(self.tables),
            token_starts=_widened(self.token_starts),
            token_counts=_widened(self.token_counts),
            written_counts=_widened(self.written_counts),
            token_ids=_widened(self.token_ids),
            appended=_widened(self.appended).reshape(-1, 3),
            closed=_widened(self.closed),
            close_reasons=_widened(self.close_reasons),
            returned=_widened(self.returned),
            replaced=_widened(self.replaced).reshape(-1, 3),
        )


Journal: TypeAlias = JournalColumns | PackedJournal
_TRIPLES = frozenset({"appended", "replaced"})
COLUMNS = tuple(field.name for field in dataclasses.fields(PackedJournal))


def _widened(data: bytes) -> Column:
    return np.frombuffer(data, columns.U32).astype(np.int64) if data else _EMPTY
