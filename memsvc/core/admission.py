"""What an admission comes with, and the record of the table that it opens."""

from __future__ import annotations

from array import array
import dataclasses

from memsvc.core.table import TableRecord
from quire.memory import AdmitRequest


@dataclasses.dataclass(frozen=True, slots=True)
class AdmitContext:
    """What the core adds to an admission.

    Attributes:
        gateway: number of the gateway.
        root: root digest of the sequence.
        tenant_tag: tag of the tenant.
        ordinal: place in the order of admissions.
    """

    gateway: int
    root: bytes
    tenant_tag: int
    ordinal: int


def new_record(request: AdmitRequest, context: AdmitContext, table: int, now: float) -> TableRecord:
    """Returns the record of a table that has no blocks yet.

    Args:
        request: whose table it is.
        context: of the request.
        table: its counter.
        now: the caller's clock.
    """
    return TableRecord(
        table=table,
        ordinal=context.ordinal,
        request_id=request.request_id,
        sample_index=request.sample_index,
        gateway=context.gateway,
        tenant=request.tenant,
        tenant_tag=context.tenant_tag,
        opened_at=now,
        cached_token_count=0,
        publishes=not request.skip_cache_write,
        blocks=array("q"),
        parent=context.root,
        session_id=request.session_id,
    )
