"""The machine of `test_memory_machine` with tenants that have quotas: nobody gets what is another's."""

from __future__ import annotations

from typing import Any, ClassVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule
import numpy as np
import pytest

from memsvc.core import retention
from memsvc.core.pool import BlockState
from memsvc.core.prefix_views import PrefixSelector
from memsvc.core.tenancy import TenantQuota
from quire.columns import pack
from quire.errors import InvalidRequestError, PinQuotaError, PrefixNotFoundError, TenantCeilingError
from tests.properties.memory_model import POOL, ModelGateway, ModelTable, tokens_of
from tests.properties.test_memory_machine import PIECES, TENANTS, USABLE, MemoryMachine


class QuotaMachine(MemoryMachine):
    """Random quotas beside random commands."""

    HAS_QUOTAS: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.quotas: dict[str, TenantQuota] = {}

    def use(self, tenant: str) -> Any:
        """Returns what a tenant has; the invariants check these figures against the blocks."""
        return self.core.pool(POOL).memory.tenant_use(self.core.tenant_tag(POOL, tenant))

    def total(self, tenant: str) -> int:
        """Returns the blocks of a tenant, held and cached."""
        use = self.use(tenant)
        return int(use.held + use.cached)

    @rule(
        tenant=TENANTS,
        floor=st.integers(0, 5),
        ceiling=st.sampled_from([None, 3, 6, 9]),
        pinned=st.sampled_from([0, 2, 3]),
    )
    def set_quota(self, tenant: str, floor: int, ceiling: int | None, pinned: int) -> None:
        """Changes a quota."""
        quota = TenantQuota(floor=floor, ceiling=ceiling, pinned=pinned)
        others = sum(one.kept for name, one in self.quotas.items() if name != tenant)
        try:
            self.core.set_quota(POOL, tenant, quota)
        except InvalidRequestError:
            assert quota.kept > (ceiling or USABLE) or quota.kept + others >= USABLE
        else:
            self.quotas[tenant] = quota

    @rule(pieces=PIECES, tenant=TENANTS)
    def pin(self, pieces: list[tuple[int, int]], tenant: str) -> None:
        """Pins a prefix: all of its blocks, within the quota, or none."""
        selector = PrefixSelector(pack(tokens_of(pieces)), tenant)
        before = int(self.use(tenant).pinned)
        try:
            count = self.core.pin_prefix(POOL, selector, self.now)
        except (PrefixNotFoundError, PinQuotaError):
            assert int(self.use(tenant).pinned) == before
        else:
            limit = self.quotas.get(tenant, TenantQuota()).pinned
            assert count <= int(self.use(tenant).pinned) <= max(before, limit)

    @rule(pieces=PIECES, tenant=TENANTS)
    def unpin(self, pieces: list[tuple[int, int]], tenant: str) -> None:
        """Releases a prefix."""
        before = int(self.use(tenant).pinned)
        try:
            count = self.core.release_prefix(POOL, PrefixSelector(pack(tokens_of(pieces)), tenant))
        except PrefixNotFoundError:
            count = 0
        assert int(self.use(tenant).pinned) == before - count

    def wishes(self, needed: int) -> dict[str, Any]:
        """See the base: some are retained, some are turns of a conversation."""
        kind = (needed + int(self.now)) % 4
        return [{}, {"session_id": "chat"}, {"retention_priority": 10, "retention_ttl_seconds": 4}, {}][kind]

    def sheltered(self) -> int:
        """Returns how many cached blocks nobody but their tenant may take."""
        tenancy, found = self.core.pool(POOL).memory.tenancy, 0
        for tenant in {"", "a"} if tenancy is not None else ():
            floor = self.quotas.get(tenant, TenantQuota()).floor
            tag = self.core.tenant_tag(POOL, tenant)
            mine = (self.pool.tenant == tag) & (self.pool.state == BlockState.CACHED)
            pinned = int(np.count_nonzero(mine & (tenancy.retention == retention.PINNED)))
            plain = int(np.count_nonzero(mine)) - pinned
            found += pinned + (plain - min(plain, max(0, self.total(tenant) - floor)) if floor else 0)
        return found

    def impossible(self, tenant: str, needed: int) -> bool:
        """See the base."""
        ceiling = self.quotas.get(tenant, TenantQuota()).ceiling
        others = sum(one.kept for name, one in self.quotas.items() if name != tenant)
        return needed > USABLE - others - int(self.use(tenant).pinned) or (ceiling is not None and needed > ceiling)

    def leasable(self, gateway: ModelGateway) -> int:
        """See the base: only a last sequence may have what a floor shelters, and not much of it."""
        available = super().leasable(gateway)
        free = available - self.sheltered()
        if free > 0 or len(gateway.tables) != 1 or gateway.leased:
            return free
        return min(available, 4)

    @rule(which=st.integers(0, 1), pieces=PIECES, tenant=TENANTS, read=st.booleans(), write=st.booleans())
    def admit(self, which: int, pieces: list[tuple[int, int]], tenant: str, read: bool, write: bool) -> None:
        """See the base: nothing is taken from below the floor of another tenant, and the ceiling is heeded."""
        totals = {name: self.total(name) for name in self.quotas}
        pinned = {name: int(self.use(name).pinned) for name in ("", "a")}
        held = int(self.use(tenant).held)
        super().admit(which, pieces, tenant, read, write)
        for name, quota in self.quotas.items():
            if name != tenant:
                assert self.total(name) >= min(totals[name], quota.floor)
        assert pinned == {name: int(self.use(name).pinned) for name in ("", "a")}
        ceiling = self.quotas.get(tenant, TenantQuota()).ceiling
        assert ceiling is None or int(self.use(tenant).held) <= max(ceiling, held)

    def fork_of(self, gateway: ModelGateway, source: ModelTable, count: int, at_token: int) -> None:
        """See the base: refused where the new tables could grow beyond their tenant's ceiling."""
        before = gateway.tables.keys() | set()
        try:
            super().fork_of(gateway, source, count, at_token)
        except TenantCeilingError:
            assert self.quotas[source.tenant].ceiling is not None
            assert gateway.tables.keys() == before


QuotaMachine.TestCase.settings = settings(
    max_examples=80, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.invariant(2, 5)
class TestQuotaMachine(QuotaMachine.TestCase):  # type: ignore[misc,name-defined]
    """Runs the machine: a failure here is a tenant that is starved, or that takes more than it may."""
