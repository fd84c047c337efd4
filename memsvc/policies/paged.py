"""`paged`: the product itself, `memsvc.core.memory.MemoryCore`, driven without a service around it."""

from __future__ import annotations

import numpy as np

from memsvc.core.memory import MemoryCore
from memsvc.core.validation import PoolRegistration
from memsvc.local import packed
from memsvc.policies.interface import Wish
from quire.memory import Admission, JournalEntry, PoolInfo, PoolSpec

_SECRET = bytes(32)
_POOL_ID = "simulated"
_GATEWAY_ID = "simulated"


class Paged:
    """Blocks taken when the one before is full, prefixes shared, admission by forecast.

    Args:
        spec: the pool.
        forecast: whether admissions look ahead; see `memsvc.core.forecast`.
    """

    def __init__(self, spec: PoolSpec, *, forecast: bool = True) -> None:
        self.core = MemoryCore(_SECRET, lease_ttl=float("inf"), forecast=forecast)
        self.core.register_pool(PoolRegistration(_POOL_ID, 1, "simulated:0", spec), 1, 0.0)
        self._gateway = self.core.connect_gateway(_GATEWAY_ID, 1, 0.0)
        self._pool = self.core.pool(_POOL_ID).info()
        self._memory = self.core.pool(_POOL_ID).memory

    @property
    def pool(self) -> PoolInfo:
        """See Policy."""
        return self._pool

    def admit(self, wish: Wish) -> Admission:
        """See Policy. What the output's length will be is not looked at."""
        return self.core.admit(self._gateway, wish.request, 0.0)

    def lease(self, granted_total: int) -> list[int]:
        """See Policy."""
        return self.core.lease(self._gateway, _POOL_ID, self._pool.epoch, granted_total, 0.0)

    def journal(self, entry: JournalEntry) -> None:
        """See Policy."""
        self.core.journal(self._gateway, _POOL_ID, entry.epoch, packed(entry), 0.0)
        # Recalls of unused leases; the simulated gateway holds none that it does not use at once.
        self.core.take_events()

    def shared_block_count(self) -> int:
        """See Policy."""
        refs = self._memory.pool.refs
        shared = refs[refs > 1]
        return int(shared.sum()) - len(shared) if len(shared) else int(np.int64(0))
