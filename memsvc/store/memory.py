"""The embedded store: nothing outlives the process, nothing needs to be installed."""

from __future__ import annotations

from collections.abc import Callable
import time

from memsvc.store.base import ServiceRecord
from memsvc.store.memory_hints import MemoryHints
from memsvc.store.memory_journals import MemoryJournals


class MemoryStore:
    """Implements `Store` in this process.

    Args:
        clock: seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._epochs: dict[str, int] = {}
        self._services: dict[tuple[str, str], tuple[ServiceRecord, float]] = {}
        self.journals = MemoryJournals()
        self.hints = MemoryHints(clock)
        self.losses = 0

    async def start(self) -> None:
        """Does nothing."""

    async def close(self) -> None:
        """Does nothing."""

    def forget_everything(self) -> None:
        """Loses all contents, as a server does that is flushed."""
        self._epochs.clear()
        self._services.clear()
        self.journals.forget_everything()
        self.hints.forget_everything()
        self.losses += 1

    async def raise_epoch(self, pool_id: str, floor: int) -> int:
        """See `Store.raise_epoch`."""
        epoch = max(floor, self._epochs.get(pool_id, 0)) + 1
        self._epochs[pool_id] = epoch
        return epoch

    async def keep_epoch(self, pool_id: str, epoch: int) -> None:
        """See `Store.keep_epoch`."""
        self._epochs[pool_id] = max(epoch, self._epochs.get(pool_id, 0))

    async def announce(self, record: ServiceRecord, ttl: float, *, takeover: bool = False) -> bool:
        """See `Store.announce`."""
        held = self._live(record.kind, record.name)
        if held is not None and held.nonce != record.nonce and not takeover:
            return False
        self._services[record.kind, record.name] = (record, self._clock() + ttl)
        return True

    async def withdraw(self, record: ServiceRecord) -> bool:
        """See `Store.withdraw`."""
        held = self._live(record.kind, record.name)
        if held is None or held.nonce != record.nonce:
            return False
        del self._services[record.kind, record.name]
        return True

    async def services(self, kind: str) -> list[ServiceRecord]:
        """See `Store.services`."""
        names = sorted(name for found, name in self._services if found == kind)
        live = [self._live(kind, name) for name in names]
        return [record for record in live if record is not None]

    def _live(self, kind: str, name: str) -> ServiceRecord | None:
        """Returns a record whose time has not run out."""
        held = self._services.get((kind, name))
        if held is None:
            return None
        record, expires_at = held
        if self._clock() >= expires_at:
            del self._services[kind, name]
            return None
        return record
