"""The machine of `test_memory_machine` with tenants that have quotas: nobody gets what is another's."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule
import pytest

from memsvc.core.tenancy import TenantQuota
from quire.errors import InvalidRequestError, TenantCeilingError
from tests.properties.memory_model import POOL, ModelGateway, ModelTable
from tests.properties.test_memory_machine import PIECES, TENANTS, USABLE, MemoryMachine


class QuotaMachine(MemoryMachine):
    """Random quotas beside random commands."""

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

    @rule(tenant=TENANTS, floor=st.integers(0, 5), ceiling=st.sampled_from([None, 3, 6, 9]))
    def set_quota(self, tenant: str, floor: int, ceiling: int | None) -> None:
        """Changes a quota."""
        quota = TenantQuota(floor=floor, ceiling=ceiling)
        others = sum(one.floor for name, one in self.quotas.items() if name != tenant)
        try:
            self.core.set_quota(POOL, tenant, quota)
        except InvalidRequestError:
            assert floor > (ceiling or USABLE) or floor + others >= USABLE
        else:
            self.quotas[tenant] = quota

    def wishes(self, needed: int) -> dict[str, Any]:
        """See the base: some are retained, some are turns of a conversation."""
        kind = (needed + int(self.now)) % 4
        return [{}, {"session_id": "chat"}, {"retention_priority": 10, "retention_ttl_seconds": 4}, {}][kind]

    def sheltered(self) -> int:
        """Returns how many cached blocks nobody but their tenant may take."""
        found = 0
        for tenant, quota in self.quotas.items():
            if quota.floor:
                cached = int(self.use(tenant).cached)
                found += cached - min(cached, max(0, self.total(tenant) - quota.floor))
        return found

    def impossible(self, tenant: str, needed: int) -> bool:
        """See the base."""
        ceiling = self.quotas.get(tenant, TenantQuota()).ceiling
        others = sum(one.floor for name, one in self.quotas.items() if name != tenant)
        return needed > USABLE - others or (ceiling is not None and needed > ceiling)

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
        held = int(self.use(tenant).held)
        super().admit(which, pieces, tenant, read, write)
        for name, quota in self.quotas.items():
            if name != tenant:
                assert self.total(name) >= min(totals[name], quota.floor)
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
