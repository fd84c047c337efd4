"""Hints in this process."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import itertools

from memsvc.store.base import HintMatch, HintOwner, HintTicket, StoreFencedError, split_identities


@dataclasses.dataclass(slots=True)
class _Lease:
    owner: HintOwner
    expires_at: float
    update_count: int = 0


@dataclasses.dataclass(slots=True)
class _Index:
    epoch: str
    entries: dict[bytes, set[int]] = dataclasses.field(default_factory=dict)
    leases: dict[int, _Lease] = dataclasses.field(default_factory=dict)


class MemoryHints:
    """Implements `HintStore` in this process.

    Args:
        clock: seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._indexes: dict[str, _Index] = {}
        self._numbers = itertools.count(1)

    def forget_everything(self) -> None:
        """Loses all contents."""
        self._indexes.clear()

    async def join(self, space: str, owner: HintOwner, capacity: int, ttl: float) -> HintTicket:
        """See `HintStore.join`."""
        del capacity
        number = next(self._numbers)
        index = self._indexes.setdefault(space, _Index(epoch=str(number)))
        for tag in [tag for tag, lease in index.leases.items() if lease.owner.pool_id == owner.pool_id]:
            del index.leases[tag]
        index.leases[number] = _Lease(owner, self._clock() + ttl)
        return HintTicket(space, index.epoch, number, generation=1, bucket_count=1)

    async def update(self, ticket: HintTicket, update_count: int, added: bytes, removed: bytes) -> None:
        """See `HintStore.update`."""
        index, lease = self._written(ticket, update_count)
        lease.update_count += 1
        for identity in split_identities(added):
            index.entries.setdefault(identity, set()).add(ticket.tag)
        for identity in split_identities(removed):
            tags = index.entries.get(identity, set())
            tags.discard(ticket.tag)
            if not tags:
                index.entries.pop(identity, None)

    async def renew(self, ticket: HintTicket, update_count: int, ttl: float) -> None:
        """See `HintStore.renew`."""
        _, lease = self._written(ticket, update_count)
        lease.expires_at = self._clock() + ttl

    async def leave(self, ticket: HintTicket) -> None:
        """See `HintStore.leave`."""
        index = self._indexes.get(ticket.space)
        if index is not None and index.epoch == ticket.epoch:
            index.leases.pop(ticket.tag, None)

    async def find(self, space: str, identities: bytes) -> list[HintMatch]:
        """See `HintStore.find`."""
        index = self._indexes.get(space)
        if index is None:
            return []
        depths: dict[int, int] = {}
        for depth, identity in enumerate(split_identities(identities), 1):
            tags = index.entries.get(identity, set())
            standing = {tag for tag in tags if depths.get(tag, 0) == depth - 1}
            if not standing:
                break
            depths.update(dict.fromkeys(standing, depth))
        live = self._live(index)
        return [HintMatch(live[tag].owner, depth) for tag, depth in depths.items() if tag in live]

    async def sweep(self, space: str) -> bool:
        """See `HintStore.sweep`. Takes all in one go."""
        index = self._indexes.get(space)
        if index is not None:
            index.leases = live = self._live(index)
            kept = {identity: {tag for tag in tags if tag in live} for identity, tags in index.entries.items()}
            index.entries = {identity: tags for identity, tags in kept.items() if tags}
        return False

    def _live(self, index: _Index) -> dict[int, _Lease]:
        """Returns the leases that are not over."""
        now = self._clock()
        return {tag: lease for tag, lease in index.leases.items() if now < lease.expires_at}

    def _written(self, ticket: HintTicket, update_count: int) -> tuple[_Index, _Lease]:
        """Returns the index and the lease, which are as their writer left them."""
        index = self._indexes.get(ticket.space)
        if index is not None and index.epoch == ticket.epoch:
            lease = self._live(index).get(ticket.tag)
            if lease is not None and lease.update_count == update_count:
                return index, lease
        raise StoreFencedError("the hint index is not as this writer left it")
