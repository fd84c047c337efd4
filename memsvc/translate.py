"""Messages of `quire.memsvc.v1` <-> what the core takes and gives."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf import duration_pb2

from memsvc.core.journal import PackedJournal
from memsvc.core.validation import PoolRegistration
from memsvc.sharing.locate import Located, Query
from protos.memsvc.v1 import memsvc_pb2
from quire import columns
from quire.errors import QuireError
from quire.media import MediaItem
from quire.memory import Admission, AdmitRequest, BlocksMerged, Fork, ForkRequest, PoolInfo, PoolSpec

_REFUSAL_TEXT_MAXIMUM = 1000


def to_duration(seconds: float) -> duration_pb2.Duration:
    """Returns a protobuf duration."""
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(int(max(0.0, seconds) * 1e9))
    return duration


def to_spec(message: memsvc_pb2.PoolSpec) -> PoolSpec:
    """Returns the geometry in a message."""
    return PoolSpec(
        block_count=message.block_count,
        block_size=message.block_size,
        bytes_per_block=message.bytes_per_block,
        model_id=message.model_id,
        kv_dtype=message.kv_dtype,
        max_model_len=message.max_model_len,
        sliding_window=message.sliding_window,
    )


def from_spec(spec: PoolSpec) -> memsvc_pb2.PoolSpec:
    """Returns a geometry as a message."""
    return memsvc_pb2.PoolSpec(
        block_count=spec.block_count,
        block_size=spec.block_size,
        bytes_per_block=spec.bytes_per_block,
        model_id=spec.model_id,
        kv_dtype=spec.kv_dtype,
        max_model_len=spec.max_model_len,
        sliding_window=spec.sliding_window,
    )


def to_registration(message: memsvc_pb2.RegisterPoolRequest) -> PoolRegistration:
    """Returns the executor in a message."""
    return PoolRegistration(message.executor_id, message.executor_incarnation, message.address, to_spec(message.spec))


def pool_state(*, ready: bool) -> memsvc_pb2.PoolState.ValueType:
    """Returns the state of a pool as it is on the wire."""
    return memsvc_pb2.POOL_STATE_READY if ready else memsvc_pb2.POOL_STATE_LOST


def from_pool(pool: PoolInfo) -> memsvc_pb2.PoolUpdate:
    """Returns a pool as gateways hear of it."""
    return memsvc_pb2.PoolUpdate(
        pool_id=pool.pool_id,
        epoch=pool.epoch,
        state=pool_state(ready=pool.ready),
        spec=from_spec(pool.spec),
        executor_address=pool.executor_address,
        executor_incarnation=pool.executor_incarnation,
    )


def to_admit(message: memsvc_pb2.AdmitRequest) -> AdmitRequest:
    """Returns the request in a message."""
    return AdmitRequest(
        pool_id=message.pool_id,
        epoch=message.epoch,
        request_id=message.request_id,
        sample_index=message.sample_index,
        token_ids=message.token_ids,
        tenant=message.tenant,
        cache_salt=message.cache_salt,
        adapter=message.adapter,
        skip_cache_read=message.skip_cache_read,
        skip_cache_write=message.skip_cache_write,
        max_new_tokens=message.max_new_tokens,
        min_new_tokens=message.min_new_tokens,
        resumed=message.resumed,
        wait_for_prefix=message.wait_for_prefix,
        media=_to_media(message.media),
        session_id=message.session_id,
        retention_priority=message.retention_priority,
        retention_ttl_seconds=message.retention_ttl_seconds,
        swapped_token_count=message.swapped_token_count,
    )


def _to_media(items: Iterable[memsvc_pb2.MediaItem]) -> tuple[MediaItem, ...]:
    """Returns the media items in a message."""
    return tuple(MediaItem(item.start, item.token_count, item.digest) for item in items)


def from_admission(request_no: int, admission: Admission) -> memsvc_pb2.ConnectResponse:
    """Returns the answer to an admit request."""
    return memsvc_pb2.ConnectResponse(
        admitted=memsvc_pb2.Admitted(
            request_no=request_no,
            epoch=admission.epoch,
            table=admission.table,
            block_ids=columns.pack(admission.block_ids),
            cached_token_count=admission.cached_token_count,
            copies=columns.pack([block for copy in admission.copies for block in copy]),
            pending_token_count=admission.pending_token_count,
        )
    )


def to_fork(message: memsvc_pb2.ForkRequest) -> ForkRequest:
    """Returns the request in a message."""
    return ForkRequest(
        pool_id=message.pool_id,
        epoch=message.epoch,
        table=message.table,
        count=message.count,
        at_token=message.at_token,
        first_sample_index=message.first_sample_index,
    )


def from_fork(request_no: int, fork: Fork) -> memsvc_pb2.ConnectResponse:
    """Returns the answer to a fork request."""
    return memsvc_pb2.ConnectResponse(
        forked=memsvc_pb2.Forked(
            request_no=request_no,
            epoch=fork.epoch,
            tables=columns.pack(fork.tables),
            block_ids=columns.pack(fork.block_ids),
            token_count=fork.token_count,
            must_copy=fork.must_copy,
        )
    )


def from_merge(event: BlocksMerged) -> memsvc_pb2.ConnectResponse:
    """Returns offered blocks as a message."""
    rows = columns.pack([value for row in event.rows for value in row])
    return memsvc_pb2.ConnectResponse(merge=memsvc_pb2.Merge(pool_id=event.pool_id, epoch=event.epoch, rows=rows))


def from_refusal(request_no: int, error: QuireError) -> memsvc_pb2.ConnectResponse:
    """Returns the answer to a request that was refused."""
    return memsvc_pb2.ConnectResponse(
        refused=memsvc_pb2.Refused(
            request_no=request_no,
            code=error.code.value[0],
            reason=error.reason,
            message=error.message[:_REFUSAL_TEXT_MAXIMUM],
            metadata=error.metadata,
        )
    )


def to_journal(message: memsvc_pb2.Journal) -> PackedJournal:
    """Returns the journal in a message.

    Raises:
        InvalidRequestError: a column is not whole rows of u32. Whether its rows are those of the columns beside it, the
            core checks.
    """
    journal = PackedJournal(
        tables=message.tables,
        token_starts=message.token_starts,
        token_counts=message.token_counts,
        written_counts=message.written_counts,
        token_ids=message.token_ids,
        appended=message.appended,
        closed=message.closed,
        close_reasons=message.close_reasons,
        returned=message.returned,
        replaced=message.replaced,
    )
    journal.check_length()
    return journal


def to_query(message: memsvc_pb2.LocateRequest) -> Query:
    """Returns the prompt to find in a message."""
    return Query(
        token_ids=message.token_ids,
        tenant=message.tenant,
        cache_salt=message.cache_salt,
        adapter=message.adapter,
        model_id=message.model_id,
        media=_to_media(message.media),
    )


def from_located(located: Located) -> memsvc_pb2.LocateResponse:
    """Returns where a prompt was found as a message."""
    return memsvc_pb2.LocateResponse(
        locations=[
            memsvc_pb2.PoolLocation(
                pool_id=location.owner.pool_id,
                token_count=location.token_count,
                exact=location.is_exact,
                executor_address=location.owner.executor_address,
                executor_incarnation=location.owner.executor_incarnation,
                memsvc_id=location.owner.memsvc_id,
                memsvc_address=location.owner.memsvc_address,
                memsvc_incarnation=location.owner.memsvc_incarnation,
            )
            for location in located.locations
        ],
        hints_searched=located.hints_searched,
    )
