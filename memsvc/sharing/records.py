"""Journal entries as bytes: about 18 bytes a block.

    entry   = record ...
    record  = kind u8 || widths u8 || rows u16 LE || identities (16 a row) || blocks || indexes

Blocks and indexes are each the first value as i32 LE, then every other less the one before it, as signed little-endian
numbers of 1 byte, or of 4 where `widths` has bit 0 (blocks) or bit 1 (indexes).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import enum
import struct

import numpy as np
import numpy.typing as npt

from memsvc.core.events import BlocksRemoved, BlocksStored, CacheEvent
from quire.errors import CorruptionError
from quire.hashing import DIGEST_BYTES

ENTRY_ROWS = 64
SNAPSHOT_ROWS = 4096
_HEADER = struct.Struct("<BBH")
_WIDE_BLOCKS, _WIDE_INDEXES = 1, 2
_NARROW = 127

Numbers = npt.NDArray[np.int64]


class RecordKind(enum.IntEnum):
    """What a record tells."""

    STORED = 1
    """Blocks can be matched."""
    REMOVED = 2
    """Blocks cannot be matched any more."""
    CLEARED = 3
    """No block can be matched any more; has no rows."""


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """A run of blocks that one thing happened to."""

    kind: RecordKind
    blocks: Numbers
    indexes: Numbers
    identities: bytes
    """16 bytes a row."""


def encode(events: Iterable[CacheEvent], row_limit: int = ENTRY_ROWS) -> Iterator[bytes]:
    """Yields events, in order, as entries of at most `row_limit` rows."""
    entry: list[bytes] = []
    room = row_limit
    for event in events:
        rows = len(event.blocks) if isinstance(event, BlocksStored | BlocksRemoved) else 0
        if not rows and not isinstance(event, BlocksStored | BlocksRemoved):
            entry.append(_HEADER.pack(RecordKind.CLEARED, 0, 0))
        start = 0
        while isinstance(event, BlocksStored | BlocksRemoved) and start < rows:
            stop = min(rows, start + room)
            entry.append(_record(event, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield b"".join(entry)
                entry, room = [], row_limit
    if entry:
        yield b"".join(entry)


def _record(event: BlocksStored | BlocksRemoved, start: int, stop: int) -> bytes:
    """Returns the rows [start, stop) of an event."""
    kind = RecordKind.STORED if isinstance(event, BlocksStored) else RecordKind.REMOVED
    blocks, wide_blocks = _differences(event.blocks[start:stop])
    indexes, wide_indexes = _differences(event.indexes[start:stop])
    widths = wide_blocks * _WIDE_BLOCKS | wide_indexes * _WIDE_INDEXES
    identities = event.identities[start * DIGEST_BYTES : stop * DIGEST_BYTES]
    return b"".join((_HEADER.pack(kind, widths, stop - start), identities, blocks, indexes))


def decode(entry: bytes) -> list[Record]:
    """Returns what an entry says.

    Raises:
        CorruptionError: it is not an entry.
    """
    reader = _Reader(entry)
    found = []
    try:
        while reader.remains():
            kind, widths, rows = _HEADER.unpack(reader.take(_HEADER.size))
            identities = reader.take(rows * DIGEST_BYTES)
            blocks = reader.take_sums(rows, wide=bool(widths & _WIDE_BLOCKS))
            indexes = reader.take_sums(rows, wide=bool(widths & _WIDE_INDEXES))
            found.append(Record(RecordKind(kind), blocks, indexes, identities))
    except ValueError as error:
        raise CorruptionError(f"a journal entry of {len(entry)} bytes cannot be read: {error}") from error
    return found


class _Reader:
    """Takes columns from the front of an entry."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def remains(self) -> bool:
        """Whether anything is left."""
        return self._at < len(self._data)

    def take(self, size: int) -> bytes:
        """Returns the next `size` bytes; raises ValueError if there are fewer."""
        taken = self._data[self._at : self._at + size]
        if len(taken) != size:
            message = f"{len(taken)} bytes where {size} are expected"
            raise ValueError(message)
        self._at += size
        return taken

    def take_sums(self, rows: int, *, wide: bool) -> Numbers:
        """Returns a column of a first value and differences, summed up."""
        values = np.zeros(rows, np.int64)
        if rows:
            values[:1] = np.frombuffer(self.take(4), "<i4")
            values[1:] = np.frombuffer(self.take((rows - 1) * (4 if wide else 1)), "<i4" if wide else "i1")
        return np.cumsum(values)


def _differences(values: npt.NDArray[np.int64]) -> tuple[bytes, bool]:
    """Returns a column as its first value and differences, and whether these take 4 bytes each."""
    differences = np.diff(values)
    wide = bool((np.abs(differences) > _NARROW).any())
    return values[:1].astype("<i4").tobytes() + differences.astype("<i4" if wide else "i1").tobytes(), wide


def rows_of(events: Sequence[CacheEvent]) -> int:
    """Returns how many blocks the events tell of; one that clears all counts as one."""
    return sum(len(event.blocks) if isinstance(event, BlocksStored | BlocksRemoved) else 1 for event in events)
