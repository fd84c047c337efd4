"""What the memory service keeps outside its own process: epochs that never fall, and who is there.

Nothing here is on the path of a step. A store that does not answer costs nothing but what it would have told.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol


@dataclasses.dataclass(frozen=True, slots=True)
class ServiceRecord:
    """One running service."""

    kind: str
    """"memsvc" or "executor"."""
    name: str
    """Stable over restarts."""
    nonce: int
    """Incarnation; drawn at each start."""
    address: str
    """host:port."""


class Store(Protocol):
    """Shared metadata. Every method raises StoreUnavailableError when the store does not answer in time."""

    async def start(self) -> None:
        """Connects. Does not raise: a store that is down now may come up."""
        ...

    async def close(self) -> None:
        """Disconnects."""
        ...

    async def raise_epoch(self, pool_id: str, floor: int) -> int:
        """Raises the epoch of a pool above both `floor` and what is stored, stores it and returns it."""
        ...

    async def keep_epoch(self, pool_id: str, epoch: int) -> None:
        """Stores `epoch` unless a higher one is stored."""
        ...

    async def announce(self, record: ServiceRecord, ttl: float, *, takeover: bool = False) -> bool:
        """Notes that a service is there for the next `ttl` seconds.

        Returns false, and changes nothing, if another incarnation of the same name is noted and `takeover` is not set.
        """
        ...

    async def withdraw(self, record: ServiceRecord) -> bool:
        """Removes a service's note; false, with nothing changed, if another incarnation's is there."""
        ...

    async def services(self, kind: str) -> list[ServiceRecord]:
        """Returns the services of `kind` that are noted, by name."""
        ...
