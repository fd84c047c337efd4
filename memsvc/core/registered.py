"""A pool as the service knows it: whose it is, in which epoch, and its memory."""

from __future__ import annotations

from collections import deque
import dataclasses

from memsvc.core.pool_memory import PoolMemory
from memsvc.core.validation import PoolRegistration
from quire.memory import PoolInfo

_SUPERSEDED_LIMIT = 64


@dataclasses.dataclass(slots=True)
class RegisteredPool:
    """A pool that this service knows."""

    registration: PoolRegistration
    epoch: int
    ready: bool
    expires_at: float
    """The executor counts as lost then."""
    memory: PoolMemory
    superseded: deque[int] = dataclasses.field(default_factory=lambda: deque(maxlen=_SUPERSEDED_LIMIT))
    """Older incarnations of the executor, the newest last."""

    def info(self) -> PoolInfo:
        """Returns the pool as gateways hear of it."""
        registration = self.registration
        return PoolInfo(
            pool_id=registration.executor_id,
            epoch=self.epoch,
            ready=self.ready,
            spec=registration.spec,
            executor_address=registration.address,
            executor_incarnation=registration.executor_incarnation,
        )
