"""The part of `AdminService` that concerns blocks and prefixes. Translates only."""

from __future__ import annotations

from typing import Any, Final

import grpc
import numpy as np

from memsvc import translate
from memsvc.core import prefix_views, retention
from memsvc.core.holdings import holdings
from memsvc.core.pool import BlockState
from memsvc.core.pool_memory import PoolMemory
from memsvc.core.prefix_views import MissReason, PrefixSelector
from memsvc.core.validation import check_identity, check_tenant
from memsvc.keeper import Keeper
from memsvc.paging import LIST_DEFAULT, LIST_MAXIMUM, page_size, read_number, write_page_token
from protos.memsvc.v1 import admin_pb2
from quire.errors import InvalidRequestError

_U64: Final = 2**64 - 1
_EXPLANATIONS: Final = {
    MissReason.NONE: "All of the prompt is cached.",
    MissReason.TOO_SHORT: "What is left is shorter than a block, and no cached block begins with it.",
    MissReason.NOT_COMMITTED: "A sequence has these tokens in block {block}; the executor has not confirmed them yet.",
    MissReason.EVICTED: "It was cached, and was evicted {age:.1f} s ago.",
    MissReason.OTHER_SCOPE: (
        "Block {block} of the same tenant has the same tokens, under another salt, adapter or beginning."
    ),
    MissReason.OTHER_TENANT: "Another tenant has the same tokens; tenants share nothing.",
    MissReason.NEVER_SEEN: "Nothing like it is cached, or was evicted as far as is remembered.",
}


class PrefixCommands:
    """Blocks, prefixes, and who holds them."""

    _keeper: Keeper

    async def ListBlocks(
        self, request: admin_pb2.ListBlocksRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> admin_pb2.ListBlocksResponse:
        """Lists blocks of a pool by id."""
        core = self._keeper.core
        memory = core.pool(request.pool_id).memory
        after = read_number("blocks", request.page_token, -1)
        size = page_size(request.page_size, LIST_DEFAULT, LIST_MAXIMUM)
        wanted = np.arange(memory.pool.block_count) > after
        if request.state:
            wanted &= memory.pool.state == _state(request.state)
        if request.HasField("tenant"):
            check_tenant(request.tenant)
            owned = (memory.pool.refs > 0) | (memory.pool.state == BlockState.CACHED)
            wanted &= owned & (memory.pool.tenant == core.tenant_tag(request.pool_id, request.tenant))
        if request.identity:
            check_identity(request.identity)
            path = prefix_views.path_of_identity(memory, request.identity).blocks
            wanted &= np.isin(np.arange(len(wanted)), path)
        found = np.flatnonzero(wanted)[: size + 1].tolist()
        return admin_pb2.ListBlocksResponse(
            blocks=[self._block(memory, block) for block in found[:size]],
            next_page_token=write_page_token("blocks", str(found[size - 1])) if len(found) > size else "",
        )

    async def ExplainPrefix(
        self, request: admin_pb2.ExplainPrefixRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> admin_pb2.ExplainPrefixResponse:
        """Says how much of a prompt is cached in a pool, and why not more."""
        selector = PrefixSelector(request.token_ids, request.tenant, request.cache_salt, request.adapter)
        found = self._keeper.core.explain_prefix(request.pool_id, selector)
        age = max(0.0, self._keeper.now - found.evicted_at)
        return admin_pb2.ExplainPrefixResponse(
            cached_token_count=found.cached_token_count,
            token_count=len(request.token_ids) // 4,
            block_index=found.block_index,
            reason=admin_pb2.MissReason.ValueType(int(found.reason)),
            explanation=_EXPLANATIONS[found.reason].format(block=found.block, age=age),
            evicted_age=translate.to_duration(age) if found.reason is MissReason.EVICTED else None,
            block_id=found.block,
        )

    async def ListPrefixes(
        self, request: admin_pb2.ListPrefixesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> admin_pb2.ListPrefixesResponse:
        """Lists the prefixes that sequences share, those that save most first."""
        memory = self._keeper.core.pool(request.pool_id).memory
        start = read_number("prefixes", request.page_token, 0)
        size = page_size(request.page_size, LIST_DEFAULT, LIST_MAXIMUM)
        found = prefix_views.shared_prefixes(memory, request.min_ref_count or 2)
        spec = memory.spec
        return admin_pb2.ListPrefixesResponse(
            prefixes=[
                admin_pb2.PrefixSummary(
                    identity=memory.prefix.identity(one.block),
                    block_id=one.block,
                    block_count=one.block_count,
                    token_count=one.block_count * spec.block_size,
                    ref_count=one.ref_count,
                    bytes=min(_U64, one.block_count * spec.bytes_per_block),
                    saved_bytes=min(_U64, one.block_count * (one.ref_count - 1) * spec.bytes_per_block),
                )
                for one in found[start : start + size]
            ],
            next_page_token=write_page_token("prefixes", str(start + size)) if len(found) > start + size else "",
        )

    async def PinPrefix(
        self, request: admin_pb2.PinPrefixRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> admin_pb2.PinPrefixResponse:
        """Keeps the cached full blocks of a prefix until they are released."""
        count = self._keeper.core.pin_prefix(request.pool_id, _selector(request.prefix), self._keeper.now)
        self._keeper.deliver()
        return admin_pb2.PinPrefixResponse(block_count=count)

    async def ReleasePrefix(
        self, request: admin_pb2.ReleasePrefixRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> admin_pb2.ReleasePrefixResponse:
        """Ends the pinning of a prefix."""
        count = self._keeper.core.release_prefix(request.pool_id, _selector(request.prefix))
        self._keeper.deliver()
        return admin_pb2.ReleasePrefixResponse(block_count=count)

    async def EvictPrefix(
        self, request: admin_pb2.EvictPrefixRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> admin_pb2.EvictPrefixResponse:
        """Forgets all that begins with a prefix, but for blocks that are used or pinned."""
        core = self._keeper.core
        count, kept = core.evict_prefix(request.pool_id, _selector(request.prefix), self._keeper.now)
        self._keeper.deliver()
        return admin_pb2.EvictPrefixResponse(block_count=count, kept_block_count=kept)

    async def FindLeaks(
        self, request: admin_pb2.FindLeaksRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> admin_pb2.FindLeaksResponse:
        """Lists what gateways hold, the oldest first."""
        now = self._keeper.now
        age = request.min_age.seconds + request.min_age.nanos / 1e9
        if age < 0:
            raise InvalidRequestError(f"min_age: found {age} s, must not be negative", field="min_age")
        start = read_number("leaks", request.page_token, 0)
        size = page_size(request.page_size, LIST_DEFAULT, LIST_MAXIMUM)
        found = holdings(self._keeper.core, request.pool_id, now - age)
        return admin_pb2.FindLeaksResponse(
            holdings=[
                admin_pb2.Holding(
                    pool_id=one.pool_id,
                    gateway_id=one.gateway_id,
                    closing=one.closing,
                    sequence_id=one.sequence_id,
                    tenant=one.tenant,
                    block_count=one.block_count,
                    age=translate.to_duration(now - one.since),
                )
                for one in found[start : start + size]
            ],
            next_page_token=write_page_token("leaks", str(start + size)) if len(found) > start + size else "",
        )

    def _block(self, memory: PoolMemory, block: int) -> admin_pb2.BlockSummary:
        """Returns a block as a message."""
        pool, since = memory.pool, float(memory.pool.since[block])
        kept = int(memory.tenancy.retention[block]) if memory.tenancy is not None else retention.NONE
        return admin_pb2.BlockSummary(
            block_id=block,
            state=admin_pb2.BlockState.ValueType(int(pool.state[block])),
            ref_count=int(pool.refs[block]),
            generation=int(pool.generation[block]),
            identity=memory.prefix.identity(block),
            retention_priority=retention.priority(kept),
            pinned=kept == retention.PINNED,
            since=translate.to_duration(self._keeper.now - since) if since else None,
        )


def _state(found: int) -> BlockState:
    """Returns the state of a number of the wire.

    Raises:
        InvalidRequestError: it is none.
    """
    try:
        return BlockState(found)
    except ValueError:
        known = ", ".join(f"{state.value} ({state.name})" for state in BlockState)
        raise InvalidRequestError(f"state: found {found}, allowed are {known}", field="state") from None


def _selector(message: admin_pb2.PrefixSelector) -> PrefixSelector:
    """Returns the selector in a message."""
    return PrefixSelector(
        token_ids=message.token_ids,
        tenant=message.tenant,
        cache_salt=message.cache_salt,
        adapter=message.adapter,
        identity=message.identity,
    )
