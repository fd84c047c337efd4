"""Pools and sequences as messages of `AdminService`."""

from __future__ import annotations

from memsvc import translate
from memsvc.core import views
from memsvc.core.pool import BlockState
from protos.memsvc.v1 import admin_pb2


def from_pool(view: views.PoolView) -> admin_pb2.Pool:
    """Returns a pool as a message."""
    pool, statistics = view.pool, view.pool.memory.statistics
    return admin_pb2.Pool(
        pool_id=pool.registration.executor_id,
        state=translate.pool_state(ready=pool.ready),
        epoch=pool.epoch,
        spec=translate.from_spec(pool.registration.spec),
        executor_address=pool.registration.address,
        used_block_count=view.count(BlockState.USED),
        cached_block_count=view.count(BlockState.CACHED),
        pending_free_block_count=view.count(BlockState.PENDING),
        leased_block_count=view.count(BlockState.LEASED),
        free_block_count=view.count(BlockState.FREE),
        used_token_count=view.used_token_count,
        used_slot_utilization=view.used_slot_utilization,
        utilization=view.utilization,
        sequence_count=pool.memory.tables.open_count,
        prefix_query_token_count=statistics.query_token_count,
        prefix_hit_token_count=statistics.hit_token_count,
        preemption_count=statistics.preemption_count,
        swap_count=statistics.swap_count,
    )


def from_sequence(view: views.SequenceView, now: float) -> admin_pb2.SequenceSummary:
    """Returns a sequence as a message, with its age at `now`."""
    record = view.record
    return admin_pb2.SequenceSummary(
        sequence_id=record.sequence_id,
        pool_id=view.pool_id,
        epoch=view.epoch,
        table=record.table,
        gateway_id=view.gateway_id,
        tenant=record.tenant,
        state=admin_pb2.SequenceState.ValueType(int(record.state)),
        token_count=view.token_count,
        written_token_count=view.written_token_count,
        committed_token_count=view.committed_token_count,
        cached_token_count=record.cached_token_count,
        block_count=view.block_count,
        age=translate.to_duration(now - record.opened_at),
        ordinal=record.ordinal,
    )
