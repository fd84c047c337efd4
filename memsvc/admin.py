"""`AdminService`: inspection and commands. Translates only; every answer is taken between two commands."""

from __future__ import annotations

from typing import Any

from google.protobuf import duration_pb2
import grpc

from memsvc import translate, translate_history
from memsvc.admin_prefixes import PrefixCommands
from memsvc.admin_tenants import TenantCommands
from memsvc.admin_watch import WatchCommands
from memsvc.core import views
from memsvc.core.validation import check_simulation
from memsvc.history import Historian, Question
from memsvc.keeper import Keeper
from memsvc.paging import LIST_DEFAULT, LIST_MAXIMUM, page_size, read_number, read_page_token, write_page_token
from memsvc.read_masks import with_read_masks
from memsvc.summaries import from_pool, from_sequence
from protos.memsvc.v1 import admin_pb2, admin_pb2_grpc

_SIMULATED_EIGHTHS = (1, 2, 4, 8, 16, 32, 64)
_TABLE_PAGE_DEFAULT, _TABLE_PAGE_MAXIMUM = 1000, 10_000


@with_read_masks(admin_pb2.DESCRIPTOR.services_by_name["AdminService"])
class AdminServicer(TenantCommands, PrefixCommands, WatchCommands, admin_pb2_grpc.AdminServiceServicer):
    """Serves the inspection of memory, and the commands of operators.

    Args:
        keeper: the owner of the core.
    """

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._historian = Historian(keeper)
        self._watcher_count = 0

    async def ListPools(
        self, request: admin_pb2.ListPoolsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> admin_pb2.ListPoolsResponse:
        """Lists the pools by id."""
        core = self._keeper.core
        after = read_page_token("pools", request.page_token)
        size = page_size(request.page_size, LIST_DEFAULT, LIST_MAXIMUM)
        names = [name for name in sorted(core.pools) if name > after]
        pools = [from_pool(views.view_pool(core, name)) for name in names[:size]]
        token = write_page_token("pools", names[size - 1]) if len(names) > size else ""
        return admin_pb2.ListPoolsResponse(pools=pools, next_page_token=token)

    async def GetPool(
        self, request: admin_pb2.GetPoolRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> admin_pb2.GetPoolResponse:
        """Shows where every block of a pool is."""
        return admin_pb2.GetPoolResponse(pool=from_pool(views.view_pool(self._keeper.core, request.pool_id)))

    async def ListSequences(
        self, request: admin_pb2.ListSequencesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> admin_pb2.ListSequencesResponse:
        """Lists sequences that hold blocks, the oldest first."""
        after = read_number("sequences", request.page_token, -1)
        size = page_size(request.page_size, LIST_DEFAULT, LIST_MAXIMUM)
        found = views.list_sequences(self._keeper.core, request.pool_id, after, size + 1)
        token = write_page_token("sequences", str(found[size - 1].record.ordinal)) if len(found) > size else ""
        sequences = [from_sequence(view, self._keeper.now) for view in found[:size]]
        return admin_pb2.ListSequencesResponse(sequences=sequences, next_page_token=token)

    async def GetBlockTable(
        self, request: admin_pb2.GetBlockTableRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> admin_pb2.GetBlockTableResponse:
        """Shows the block table of a sequence."""
        core = self._keeper.core
        start = read_number("table", request.page_token, 0)
        size = page_size(request.page_size, _TABLE_PAGE_DEFAULT, _TABLE_PAGE_MAXIMUM)
        sequence = views.find_sequence(core, request.sequence_id)
        entries = [
            admin_pb2.BlockTableEntry(
                index=entry.index,
                block_id=entry.block_id,
                ref_count=entry.ref_count,
                generation=entry.generation,
                written_token_count=entry.written_token_count,
                identity=entry.identity,
            )
            for entry in views.list_table(core, sequence, start, size)
        ]
        more = start + size < len(sequence.record.blocks)
        return admin_pb2.GetBlockTableResponse(
            sequence=from_sequence(sequence, self._keeper.now),
            block_size=core.pool(sequence.pool_id).registration.spec.block_size,
            entries=entries,
            next_page_token=write_page_token("table", str(start + size)) if more else "",
        )

    async def GetBlock(
        self, request: admin_pb2.GetBlockRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> admin_pb2.GetBlockResponse:
        """Shows one block: who holds it and why."""
        view = views.view_block(self._keeper.core, request.pool_id, request.block_id)
        return admin_pb2.GetBlockResponse(
            block_id=view.block_id,
            state=admin_pb2.BlockState.ValueType(int(view.state)),
            ref_count=view.ref_count,
            generation=view.generation,
            identity=view.identity,
            sequence_ids=view.sequence_ids,
            leased_to=view.leased_to,
            explanation=view.explanation,
            since=translate.to_duration(self._keeper.now - view.since) if view.since else None,
        )

    async def History(
        self, request: admin_pb2.HistoryRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> admin_pb2.HistoryResponse:
        """Tells what happened to a block, to a sequence, or to everything."""
        told = await self._historian.tell(
            Question(
                pool_id=request.pool_id,
                block_id=request.block_id,
                sequence_id=request.sequence_id,
                after=read_number("history", request.page_token, -1),
                limit=page_size(request.page_size, LIST_DEFAULT, LIST_MAXIMUM),
            )
        )
        now = self._keeper.now
        return admin_pb2.HistoryResponse(
            records=[translate_history.from_record(record, now) for record in told.records],
            next_page_token=write_page_token("history", str(told.cursor)) if told.cursor >= 0 else "",
            log_age=_age(now, told.begins_at),
        )

    async def Simulate(
        self, request: admin_pb2.SimulateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> admin_pb2.SimulateResponse:
        """Says what the recent traffic would have found in pools of other sizes."""
        spec = self._keeper.core.pool(request.pool_id).registration.spec
        block_size = request.block_size or spec.block_size
        check_simulation(block_size, request.block_counts)
        usable = spec.usable_block_count * spec.block_size // block_size
        block_counts = list(request.block_counts) or [max(1, usable * times // 8) for times in _SIMULATED_EIGHTHS]
        told = await self._historian.simulate(request.pool_id, block_size, block_counts)
        return admin_pb2.SimulateResponse(
            request_count=told.traffic.trace.request_count,
            query_token_count=told.traffic.asked_token_count,
            hit_token_count=told.traffic.found_token_count,
            sizes=[
                admin_pb2.SimulatedSize(block_count=count, hit_token_count=hit)
                for count, hit in zip(block_counts, told.found_token_counts, strict=True)
            ],
            endless_hit_token_count=told.endless_token_count,
            block_size=block_size,
            sampled_share=told.traffic.trace.sampled_share,
            log_age=_age(self._keeper.now, told.traffic.begins_at),
        )

    async def ResetCache(
        self, request: admin_pb2.ResetCacheRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> admin_pb2.ResetCacheResponse:
        """Forgets everything that prompts can match in a pool."""
        count = await self._keeper.reset_cache(request.pool_id, force=request.force)
        epoch = self._keeper.core.pool(request.pool_id).epoch
        return admin_pb2.ResetCacheResponse(block_count=count, epoch=epoch)

    async def ListResidencies(
        self, request: admin_pb2.ListResidenciesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> admin_pb2.ListResidenciesResponse:
        """Lists lives of blocks that have ended."""
        sampler = self._keeper.core.pool(request.pool_id).memory.pool.residencies
        after = read_number("residencies", request.page_token, 0)
        size = page_size(request.page_size, LIST_DEFAULT, LIST_MAXIMUM)
        found = sampler.records(after, size + 1) if sampler is not None else []
        residencies = [
            admin_pb2.Residency(
                block_id=life.block_id,
                lifetime=translate.to_duration(life.lifetime),
                idle=translate.to_duration(life.idle),
                accesses=[translate.to_duration(at - life.born) for at in life.accesses],
            )
            for life in found[:size]
        ]
        token = write_page_token("residencies", str(found[size - 1].number)) if len(found) > size else ""
        return admin_pb2.ListResidenciesResponse(residencies=residencies, next_page_token=token)


def _age(now: float, then: float | None) -> duration_pb2.Duration | None:
    """Returns how long ago something was."""
    return translate.to_duration(now - then) if then is not None else None
