"""Journals in this process."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses

from memsvc.store.base import JournalPosition, JournalRead, StoreFencedError


@dataclasses.dataclass(slots=True)
class _Journal:
    epoch: int
    life: str
    snapshot: list[bytes]
    snapshot_at: int = 0
    """Entries that the snapshot holds."""
    floor: int = 0
    """Entries that were dropped."""
    entries: list[bytes] = dataclasses.field(default_factory=list)

    @property
    def last(self) -> int:
        return self.floor + len(self.entries)


class MemoryJournals:
    """Implements `JournalStore` in this process."""

    def __init__(self) -> None:
        self._journals: dict[str, _Journal] = {}

    def forget_everything(self) -> None:
        """Loses all contents."""
        self._journals.clear()

    async def begin(self, pool_id: str, epoch: int, life: str, snapshot: Sequence[bytes]) -> None:
        """See `JournalStore.begin`."""
        held = self._journals.get(pool_id)
        if held is not None and held.epoch > epoch:
            raise StoreFencedError(f"the journal of pool {pool_id!r} has a writer of epoch {held.epoch}")
        self._journals[pool_id] = _Journal(epoch, life, list(snapshot))

    async def append(self, pool_id: str, life: str, sequence: int, entries: Sequence[bytes]) -> None:
        """See `JournalStore.append`."""
        held = self._journals.get(pool_id)
        if held is not None and held.life == life and held.last == sequence + len(entries):
            return
        self._written(pool_id, life, sequence).entries.extend(entries)

    async def checkpoint(self, pool_id: str, life: str, sequence: int, snapshot: Sequence[bytes], keep: int) -> None:
        """See `JournalStore.checkpoint`."""
        journal = self._written(pool_id, life, sequence)
        journal.snapshot, journal.snapshot_at = list(snapshot), sequence
        surplus = max(0, len(journal.entries) - keep)
        del journal.entries[:surplus]
        journal.floor += surplus

    async def renew(self, pool_id: str, life: str, sequence: int) -> None:
        """See `JournalStore.renew`."""
        self._written(pool_id, life, sequence)

    async def end(self, pool_id: str, life: str) -> None:
        """See `JournalStore.end`."""
        held = self._journals.get(pool_id)
        if held is not None and held.life == life:
            del self._journals[pool_id]

    async def read(self, pool_id: str, position: JournalPosition | None, limit: int) -> JournalRead | None:
        """See `JournalStore.read`."""
        journal = self._journals.get(pool_id)
        if journal is None:
            return None
        snapshot: list[bytes] | None = None
        if position is None or position.life != journal.life or not journal.floor <= position.sequence <= journal.last:
            snapshot = list(journal.snapshot)
            position = JournalPosition(journal.life, journal.snapshot_at)
        start = position.sequence - journal.floor
        entries = journal.entries[start : start + limit]
        return JournalRead(JournalPosition(journal.life, position.sequence + len(entries)), snapshot, entries)

    def _written(self, pool_id: str, life: str, sequence: int) -> _Journal:
        """Returns the journal, which is where its writer left it."""
        held = self._journals.get(pool_id)
        if held is None or held.life != life or held.last != sequence:
            raise StoreFencedError(f"the journal of pool {pool_id!r} is not where this writer left it")
        return held
