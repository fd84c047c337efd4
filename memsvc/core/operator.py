"""What operators command: the part of the memory core that concerns caches, quotas and pins."""

from __future__ import annotations

import abc

import numpy as np

from memsvc.core import prefix_views, retention
from memsvc.core.commands import Recorder, command
from memsvc.core.free_order import BlockIds
from memsvc.core.lease import CoreEvent, PoolChanged
from memsvc.core.pool import BlockState
from memsvc.core.pool_memory import PoolMemory
from memsvc.core.prefix_views import Explanation, Path, PrefixSelector
from memsvc.core.registered import RegisteredPool
from memsvc.core.tenancy import NO_QUOTA, TenantQuota
from memsvc.core.validation import EPOCH_MAXIMUM, check_quota, check_selector
from quire.errors import PinQuotaError, PrefixNotFoundError, StaleEpochError
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
    def prefix_root(self, pool_id: str, adapter: str = "", tenant: str = "", cache_salt: str = "") -> bytes:
        """Returns the digest to which the first block of such a sequence is chained."""

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

    @command()
    def pin_prefix(self, pool_id: str, selector: PrefixSelector, now: float) -> int:
        """Keeps the full blocks of a cached prefix until they are released; returns how many it has.

        Raises:
            PoolNotFoundError, InvalidRequestError: no such pool; the selector cannot be.
            PrefixNotFoundError: prompts can match no full block of it.
            PinQuotaError: the tenant may not have so many blocks pinned.
        """
        memory, tenancy = self.pool(pool_id).memory, self.pool(pool_id).memory.tenancy
        blocks = self._matchable(pool_id, selector)
        new, before, limit = blocks, 0, 0
        if tenancy is not None:
            new = blocks[tenancy.retention[blocks] != retention.PINNED]
            number = int(tenancy.owner[blocks[0]])
            before, limit = int(tenancy.pinned[number]), tenancy.quota(number).pinned
        if not len(new):
            return len(blocks)
        if tenancy is None or before + len(new) > limit:
            raise PinQuotaError(
                f"{len(new)} blocks more would be pinned, of the tenant {before} are and {limit} may be",
                metadata={"pinned_block_count": before, "needed_block_count": len(new), "quota_block_count": limit},
            )
        tenancy.expire(now)
        # The tail first: if a pin must yield, the beginning goes last.
        memory.begin_tenancy().pin(new[::-1], number)
        return len(blocks)

    @command()
    def release_prefix(self, pool_id: str, selector: PrefixSelector) -> int:
        """Ends the pinning of a prefix; returns how many blocks are released.

        A block that a pinned block continues stays pinned: without it, that one could not be matched.

        Raises:
            PoolNotFoundError, InvalidRequestError: no such pool; the selector cannot be.
            PrefixNotFoundError: nothing of it is cached.
        """
        memory = self.pool(pool_id).memory
        path = self._path(pool_id, selector)
        if not len(path.blocks):
            raise _not_found(pool_id)
        tenancy = memory.tenancy
        if tenancy is None:
            return 0
        pinned = tenancy.retention == retention.PINNED
        others = pinned.copy()
        others[path.blocks] = False
        needed = prefix_views.with_beginnings(others, prefix_views.parents_of(memory))
        # The tail first: it is evicted first, too.
        released = path.blocks[(pinned & ~needed)[path.blocks]][::-1]
        tenancy.let_go(released)
        return len(released)

    @command()
    def evict_prefix(self, pool_id: str, selector: PrefixSelector, now: float) -> tuple[int, int]:
        """Forgets all that begins with a prefix, and what of the prefix itself nothing else begins with.

        Blocks that are used or pinned stay, and so do those that what stays begins with.

        Returns:
            Blocks that were forgotten, and blocks that stay.

        Raises:
            PoolNotFoundError, InvalidRequestError: no such pool; the selector cannot be.
            PrefixNotFoundError: nothing of it is cached.
        """
        memory = self.pool(pool_id).memory
        path = self._path(pool_id, selector)
        parents = prefix_views.parents_of(memory)
        concerned = prefix_views.continuations(memory, path, parents)
        concerned[path.blocks] = True
        if not concerned.any():
            raise _not_found(pool_id)
        gone = prefix_views.evictable(memory, concerned, parents)
        memory.forget_evicted(gone, now)
        memory.pool.discard_cached(gone, now)
        return len(gone), int(np.count_nonzero(concerned)) - len(gone)

    def explain_prefix(self, pool_id: str, selector: PrefixSelector) -> Explanation:
        """Returns how much of a prompt is cached, and why not more; changes nothing.

        Raises:
            PoolNotFoundError, InvalidRequestError: no such pool; there can be no such prompt.
        """
        pool = self.pool(pool_id)
        check_selector(selector, pool.registration.spec)
        root = self.prefix_root(pool_id, selector.adapter, selector.tenant, selector.cache_salt)
        return prefix_views.explain(pool.memory, selector.token_ids, root, self.tenant_tag(pool_id, selector.tenant))

    def _matchable(self, pool_id: str, selector: PrefixSelector) -> BlockIds:
        """Returns the full blocks that prompts match of a prefix, the beginning first; raises as `pin_prefix`."""
        memory = self.pool(pool_id).memory
        if selector.identity:
            path = self._path(pool_id, selector)
            found = path.blocks if prefix_views.is_whole(memory, path) else path.blocks[:0]
        else:
            check_selector(selector, memory.spec)
            root = self.prefix_root(pool_id, selector.adapter, selector.tenant, selector.cache_salt)
            found = prefix_views.find_match(memory, selector.token_ids, root).found
        if not len(found):
            raise _not_found(pool_id)
        return found

    def _path(self, pool_id: str, selector: PrefixSelector) -> Path:
        """Returns the blocks of a prefix that are there, and where it ends; raises as `pin_prefix`, but if empty."""
        memory = self.pool(pool_id).memory
        check_selector(selector, memory.spec)
        if selector.identity:
            return prefix_views.path_of_identity(memory, selector.identity)
        root = self.prefix_root(pool_id, selector.adapter, selector.tenant, selector.cache_salt)
        return prefix_views.path_of_tokens(memory, selector.token_ids, root)

    def _install_quotas(self, pool: RegisteredPool) -> None:
        """Has the memory of a new epoch know the tenants' quotas."""
        spec = pool.registration.spec
        pool.install_quotas(lambda tenant: self._tenant_tag(spec, tenant))


def _not_found(pool_id: str) -> PrefixNotFoundError:
    return PrefixNotFoundError(f"nothing of the prefix is cached in pool {pool_id!r}", metadata={"pool_id": pool_id})
