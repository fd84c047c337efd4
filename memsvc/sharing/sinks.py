"""Where the cache events of a pool go: its journal, and the hints of its space."""

from __future__ import annotations

from collections.abc import Sequence
import secrets
from typing import Protocol

from memsvc.core.events import BlocksRemoved, BlocksStored, CacheEvent
from memsvc.sharing import records
from memsvc.store.base import HintOwner, HintSpace, HintStore, HintTicket, JournalStore, StoreFencedError
from quire.hashing import DIGEST_BYTES

_APPEND_ENTRIES = 64
# A snapshot is written when so many entries have come since the last one; half of them are kept for readers that are
# a little behind.
_CHECKPOINT_ENTRIES = 4096
_UPDATE_IDENTITIES = 512
_SWEEPS_AT_ONCE = 8


class Sink(Protocol):
    """Keeps a copy of what a pool caches in the store.

    `begin` comes first, and again after any other method has raised: what was there before is void. Every method raises
    StoreUnavailableError, and StoreFencedError when the store does not hold what was left there.
    """

    name: str

    async def begin(self, published: BlocksStored) -> None:
        """Starts with everything there is."""
        ...

    async def write(self, events: Sequence[CacheEvent]) -> None:
        """Adds what happened since, in order."""
        ...

    def wants_checkpoint(self) -> bool:
        """Whether `checkpoint` is due."""
        ...

    async def checkpoint(self, published: BlocksStored) -> None:
        """Takes everything there is, all events written included, to replace what it has."""
        ...

    async def renew(self) -> None:
        """Keeps the copy alive while nothing happens."""
        ...

    async def end(self) -> None:
        """Removes the copy: the pool is gone."""
        ...


class JournalSink:
    """Writes the journal of one epoch of a pool.

    Args:
        journals: where to.
        pool_id: the pool.
        epoch: its epoch.
        checkpoint_entries: entries after which a snapshot is due.
    """

    name = "journal"

    def __init__(
        self, journals: JournalStore, pool_id: str, epoch: int, checkpoint_entries: int = _CHECKPOINT_ENTRIES
    ) -> None:
        self._journals = journals
        self._pool_id = pool_id
        self._epoch = epoch
        self._checkpoint_entries = checkpoint_entries
        self._life = ""
        self._sequence = 0
        self._checkpoint_at = 0

    async def begin(self, published: BlocksStored) -> None:
        """See `Sink.begin`."""
        life = secrets.token_hex(8)
        await self._journals.begin(self._pool_id, self._epoch, life, _snapshot(published))
        self._life, self._sequence, self._checkpoint_at = life, 0, 0

    async def write(self, events: Sequence[CacheEvent]) -> None:
        """See `Sink.write`."""
        entries = list(records.encode(events))
        for start in range(0, len(entries), _APPEND_ENTRIES):
            part = entries[start : start + _APPEND_ENTRIES]
            await self._journals.append(self._pool_id, self._life, self._sequence, part)
            self._sequence += len(part)

    def wants_checkpoint(self) -> bool:
        """See `Sink.wants_checkpoint`."""
        return self._sequence - self._checkpoint_at >= self._checkpoint_entries

    async def checkpoint(self, published: BlocksStored) -> None:
        """See `Sink.checkpoint`."""
        keep = self._checkpoint_entries // 2
        await self._journals.checkpoint(self._pool_id, self._life, self._sequence, _snapshot(published), keep)
        self._checkpoint_at = self._sequence

    async def renew(self) -> None:
        """See `Sink.renew`."""
        await self._journals.renew(self._pool_id, self._life, self._sequence)

    async def end(self) -> None:
        """See `Sink.end`."""
        if self._life:
            await self._journals.end(self._pool_id, self._life)


class HintSink:
    """Writes the hints of one epoch of a pool.

    Args:
        hints: where to.
        space: the pool's.
        owner: the pool, as it is found.
        block_count: of the pool.
        ttl: seconds after which the hints vanish unless renewed.
    """

    name = "hints"

    def __init__(self, hints: HintStore, space: HintSpace, owner: HintOwner, block_count: int, ttl: float) -> None:
        self._hints = hints
        self._space = space
        self._owner = owner
        self._capacity = -(-block_count // space.stride)
        self._ttl = ttl
        self._ticket: HintTicket | None = None
        self._update_count = 0

    async def begin(self, published: BlocksStored) -> None:
        """See `Sink.begin`. Hints appear by and by, not at one instant."""
        self._ticket = await self._hints.join(self._space.key, self._owner, self._capacity, self._ttl)
        self._update_count = 0
        await self.write([published])

    async def write(self, events: Sequence[CacheEvent]) -> None:
        """See `Sink.write`. Only blocks at the end of a stride leave a hint, and only what came of them in the end."""
        outcome: dict[bytes, bool] = {}
        stride = self._space.stride
        for event in events:
            if not isinstance(event, BlocksStored | BlocksRemoved):
                raise StoreFencedError("the pool was cleared; its hints begin again")
            for row in ((event.indexes + 1) % stride == 0).nonzero()[0].tolist():
                identity = event.identities[row * DIGEST_BYTES : (row + 1) * DIGEST_BYTES]
                outcome[identity] = isinstance(event, BlocksStored)
        items = list(outcome.items())
        for start in range(0, len(items), _UPDATE_IDENTITIES):
            part = items[start : start + _UPDATE_IDENTITIES]
            added = b"".join(identity for identity, stored in part if stored)
            removed = b"".join(identity for identity, stored in part if not stored)
            await self._hints.update(self._required(), self._update_count, added, removed)
            self._update_count += 1

    def wants_checkpoint(self) -> bool:
        """See `Sink.wants_checkpoint`."""
        return False

    async def checkpoint(self, published: BlocksStored) -> None:
        """Never due."""

    async def renew(self) -> None:
        """See `Sink.renew`. Also sweeps a little."""
        await self._hints.renew(self._required(), self._update_count, self._ttl)
        for _ in range(_SWEEPS_AT_ONCE):
            if not await self._hints.sweep(self._space.key):
                return

    async def end(self) -> None:
        """See `Sink.end`."""
        if self._ticket is not None:
            await self._hints.leave(self._ticket)

    def _required(self) -> HintTicket:
        if self._ticket is None:
            raise StoreFencedError("the hints have not begun")
        return self._ticket


def _snapshot(published: BlocksStored) -> list[bytes]:
    return list(records.encode([published], records.SNAPSHOT_ROWS))
