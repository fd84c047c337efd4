"""What operators command: the part of the memory core that concerns caches, quotas and pins."""

from __future__ import annotations

import abc

from memsvc.core.commands import Recorder, command
from memsvc.core.lease import CoreEvent, PoolChanged
from memsvc.core.pool import BlockState
from memsvc.core.pool_memory import PoolMemory
from memsvc.core.registered import RegisteredPool
from memsvc.core.tenancy import NO_QUOTA, TenantQuota
from memsvc.core.validation import EPOCH_MAXIMUM, check_quota
from quire.errors import StaleEpochError
from quire.memory import PoolSpec


class OperatorCommands(abc.ABC):
    """Commands of operators on the pools of a core."""

    log: Recorder | None
    _events: list[CoreEvent]

    @abc.abstractmethod
    def pool(self, pool_id: str) -> RegisteredPool:
        """Returns a pool; raises PoolNotFoundError."""

    @abc.abstractmethod
    def _new_memory(self, spec: PoolSpec, epoch: int) -> PoolMemory:
        """Returns the memory of a pool that begins an epoch."""

    @abc.abstractmethod
    def _tenant_tag(self, spec: PoolSpec, tenant: str) -> int:
        """Returns the number that marks the blocks of a tenant."""

    @abc.abstractmethod
    def _forget_fenced_gateways(self) -> None:
        """Drops closed gateways that hold nothing any more."""

    def tenant_tag(self, pool_id: str, tenant: str) -> int:
        """Returns the number that marks the blocks of a tenant in a pool."""
        return self._tenant_tag(self.pool(pool_id).registration.spec, tenant)

    @command()
    def reset_cache(self, pool_id: str, now: float, epoch: int = 0) -> int:
        """Forgets everything that can be matched in a pool and returns how many blocks held it.

        Args:
            pool_id: the pool.
            now: the caller's clock.
            epoch: where sequences hold blocks, begin this epoch, which voids every table and grant: their gateways
                queue them again in their order. 0 to refuse then.

        Raises:
            PoolNotFoundError: no such pool.
            CacheInUseError: sequences hold blocks and `epoch` is 0.
            StaleEpochError: `epoch` is not above every epoch that the pool ever had.
        """
        pool = self.pool(pool_id)
        if not epoch or not pool.memory.tables.open_count:
            return pool.memory.reset(now)
        if not pool.epoch < epoch <= EPOCH_MAXIMUM:
            raise StaleEpochError(f"epoch: {epoch} does not rise above {pool.epoch}")
        blocks = pool.memory.pool
        count = blocks.count(BlockState.USED) + blocks.count(BlockState.CACHED) + blocks.count(BlockState.PENDING)
        pool.epoch = epoch
        pool.memory = self._new_memory(pool.registration.spec, epoch)
        self._install_quotas(pool)
        pool.memory.prefix.clear()
        self._events.append(PoolChanged(pool_id))
        self._forget_fenced_gateways()
        return count

    @command()
    def set_quota(self, pool_id: str, tenant: str, quota: TenantQuota) -> None:
        """Changes what a tenant may hold and keep of a pool. What it has beyond that stays until it is let go.

        Raises:
            PoolNotFoundError: no such pool.
            InvalidRequestError: the numbers do not fit one another, the pool, or the other tenants' floors.
        """
        pool = self.pool(pool_id)
        check_quota(tenant, quota, pool.quotas, pool.registration.spec.usable_block_count)
        pool.memory.begin_tenancy().set_quota(self.tenant_tag(pool_id, tenant), quota)
        if quota == NO_QUOTA:
            pool.quotas.pop(tenant, None)
        else:
            pool.quotas[tenant] = quota

    def _install_quotas(self, pool: RegisteredPool) -> None:
        """Has the memory of a new epoch know the tenants' quotas."""
        spec = pool.registration.spec
        pool.install_quotas(lambda tenant: self._tenant_tag(spec, tenant))
