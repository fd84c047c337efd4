"""The part of `AdminService` that concerns tenants. Translates only."""

from __future__ import annotations

from typing import Any

import grpc

from memsvc.core.memory import MemoryCore
from memsvc.core.tenancy import NO_QUOTA, TenantQuota
from memsvc.core.validation import check_tenant
from memsvc.keeper import Keeper
from memsvc.paging import LIST_DEFAULT, LIST_MAXIMUM, page_size, read_page_token, write_page_token
from protos.memsvc.v1 import admin_pb2


class TenantCommands:
    """Quotas: what tenants may hold and keep."""

    _keeper: Keeper

    async def SetQuota(
        self, request: admin_pb2.SetQuotaRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> admin_pb2.SetQuotaResponse:
        """Changes what a tenant may hold and keep of a pool."""
        core = self._keeper.core
        core.set_quota(request.pool_id, request.tenant, to_quota(request.quota))
        self._keeper.deliver()
        return admin_pb2.SetQuotaResponse(usage=_usage(core, request.pool_id, request.tenant))

    async def GetQuota(
        self, request: admin_pb2.GetQuotaRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> admin_pb2.GetQuotaResponse:
        """Shows what a tenant has of a pool, and what it may have."""
        check_tenant(request.tenant)
        return admin_pb2.GetQuotaResponse(usage=_usage(self._keeper.core, request.pool_id, request.tenant))

    async def ListQuotas(
        self, request: admin_pb2.ListQuotasRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> admin_pb2.ListQuotasResponse:
        """Lists the tenants of a pool that have a quota, by name."""
        core = self._keeper.core
        quotas = core.pool(request.pool_id).quotas
        # The default tenant has no name: the cursor has a letter ahead of each.
        after = read_page_token("quotas", request.page_token)
        size = page_size(request.page_size, LIST_DEFAULT, LIST_MAXIMUM)
        names = [name for name in sorted(quotas) if f"+{name}" > after]
        return admin_pb2.ListQuotasResponse(
            usages=[_usage(core, request.pool_id, name) for name in names[:size]],
            next_page_token=write_page_token("quotas", f"+{names[size - 1]}") if len(names) > size else "",
        )


def to_quota(message: admin_pb2.Quota) -> TenantQuota:
    """Returns the quota in a message."""
    return TenantQuota(
        floor=message.floor_block_count,
        ceiling=message.ceiling_block_count if message.HasField("ceiling_block_count") else None,
        retained=message.retained_block_count if message.HasField("retained_block_count") else None,
        pinned=message.pinned_block_count,
    )


def _usage(core: MemoryCore, pool_id: str, tenant: str) -> admin_pb2.TenantUsage:
    """Returns a tenant as a message."""
    pool = core.pool(pool_id)
    quota = pool.quotas.get(tenant, NO_QUOTA)
    use = pool.memory.tenant_use(core.tenant_tag(pool_id, tenant))
    return admin_pb2.TenantUsage(
        tenant=tenant,
        quota=admin_pb2.Quota(
            floor_block_count=quota.floor,
            ceiling_block_count=quota.ceiling,
            retained_block_count=quota.retained,
            pinned_block_count=quota.pinned,
        ),
        held_block_count=use.held,
        cached_block_count=use.cached,
        retained_block_count=use.retained,
        pinned_block_count=use.pinned,
    )
