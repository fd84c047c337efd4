"""A pool as the service knows it: whose it is, in which epoch, and its memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
import dataclasses

from memsvc.core.pool_memory import PoolMemory
from memsvc.core.tenancy import TenantQuota
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
    quotas: dict[str, TenantQuota] = dataclasses.field(default_factory=dict)
    """What tenants may hold and keep, by name; kept over changes of the epoch."""
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

    def install_quotas(self, tag_of: Callable[[str], int]) -> None:
        """Has the memory of a new epoch know the quotas, cut to a pool that is smaller than it was.

        Args:
            tag_of: returns the tag of a tenant's blocks.
        """
        usable = self.registration.spec.usable_block_count
        kept = 0
        for tenant, quota in self.quotas.items():
            fitting = quota.within(usable)
            if kept + fitting.kept >= usable:
                fitting = dataclasses.replace(fitting, floor=0, pinned=0)
            kept += fitting.kept
            self.memory.begin_tenancy().set_quota(tag_of(tenant), fitting)
