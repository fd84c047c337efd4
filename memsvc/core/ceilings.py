"""Whether a tenant may have one more sequence: now, or ever.

A ceiling holds at all times because growth is counted in advance: an admission takes into account the blocks that the
tenant's sequences hold, those that they may still grow by, and those of the sequence itself up to its last token.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from memsvc.core import retention
from memsvc.core.free_order import BlockIds
from memsvc.core.lease import Grants
from memsvc.core.pool import RETRY_AFTER_SECONDS, BlockPool
from memsvc.core.table import TableColumns, TableRecord, TableState
from memsvc.core.tenancy import LAST_RESORT, NOBODY, Tenancy
from quire.errors import PromptTooLongError, TenantCeilingError
from quire.memory import AdmitRequest, PoolSpec
from quire.units import div_ceil

_TOKEN_BYTES = 4
# Blocks for growth that floors and pins yield at once to a gateway's last sequence.
_LAST_RESORT_GRANT = 4


@dataclasses.dataclass(frozen=True, slots=True)
class TenantGate:
    """Decides about admissions of one tenant.

    Attributes:
        tenancy: the tenants of the pool.
        number: the tenant.
        spec: the pool.
    """

    tenancy: Tenancy
    number: int
    spec: PoolSpec

    def final_count(self, request: AdmitRequest) -> int:
        """Returns the most blocks that the sequence may come to have."""
        known = len(request.token_ids) // _TOKEN_BYTES
        return div_ceil(max(known, min(known + request.max_new_tokens, self.spec.max_model_len)), self.spec.block_size)

    def require_possible(self, request: AdmitRequest, block_count: int, matched: BlockIds) -> None:
        """Raises PromptTooLongError if the sequence can never fit under the ceiling, or beside floors and pins.

        Args:
            request: what is asked for.
            block_count: blocks of its tokens.
            matched: those of them that were found in the cache.
        """
        ceiling = self.tenancy.quota(self.number).ceiling
        final = self.final_count(request)
        others = self.tenancy.guaranteed(self.number)
        # Its own pins are in the way but for those that it uses.
        others += int(self.tenancy.pinned[self.number])
        others -= int(np.count_nonzero(self.tenancy.retention[matched] == retention.PINNED))
        usable = self.spec.usable_block_count
        if ceiling is not None and final > ceiling:
            message = (
                f"token_ids: the prompt and {request.max_new_tokens} tokens to come need {final} blocks, tenant "
                f"{request.tenant!r} may hold {ceiling}"
            )
        elif block_count > usable - others:
            message = (
                f"token_ids: {block_count} blocks are needed; of {usable} blocks {others} are kept by floors and pins"
            )
        else:
            return
        raise PromptTooLongError(
            message,
            field="token_ids",
            metadata={
                "tenant": request.tenant,
                "needed_block_count": final,
                "ceiling_block_count": usable if ceiling is None else ceiling,
                "sheltered_block_count": others,
                "usable_block_count": usable,
            },
        )

    def room(self, request: AdmitRequest, tables: TableColumns, tag: int, block_count: int) -> int | None:
        """Returns how many blocks the tenant may come to hold more, growth set aside; None for no limit."""
        ceiling = self.tenancy.quota(self.number).ceiling
        if ceiling is None:
            return None
        growth = self.final_count(request) - block_count
        return ceiling - int(self.tenancy.held[self.number]) - growth - self._outstanding(tables, tag)

    def require_room(self, request: AdmitRequest, needed: int, room: int | None) -> None:
        """Raises TenantCeilingError if `needed` blocks are more than there is room for."""
        if room is not None:
            self._require(request.tenant, needed, room)

    def _require(self, tenant: str, needed: int, room: int) -> None:
        if needed <= room:
            return
        ceiling = self.tenancy.quota(self.number).ceiling
        held = int(self.tenancy.held[self.number])
        raise TenantCeilingError(
            f"tenant {tenant!r} holds {held} blocks and may hold {ceiling}; {needed} more are needed and "
            f"{max(0, room)} are left beside what its sequences may still grow by",
            metadata={
                "tenant": tenant,
                "held_block_count": held,
                "needed_block_count": needed,
                "room_block_count": max(0, room),
                "ceiling_block_count": ceiling,
            },
            retry_after=RETRY_AFTER_SECONDS,
        )

    def require_growth(self, source: TableRecord, tables: TableColumns, count: int, full: int) -> None:
        """Raises TenantCeilingError if `count` more tables like `source` may grow beyond the ceiling.

        Args:
            source: the table that is forked.
            tables: those of the pool.
            count: how many are opened.
            full: blocks that they share and never write into.
        """
        ceiling = self.tenancy.quota(self.number).ceiling
        if ceiling is None:
            return
        limit = min(int(tables.limit[tables.slot(source.table)]), self.spec.max_model_len)
        # What it wrote last may be in a block that it shares from now on, and copies.
        needed = count * max(0, div_ceil(limit, self.spec.block_size) - full) + 1
        held = int(self.tenancy.held[self.number])
        self._require(source.tenant, needed, ceiling - held - self._outstanding(tables, source.tenant_tag))

    def _outstanding(self, tables: TableColumns, tag: int) -> int:
        """Returns by how many blocks the tenant's open sequences may still grow."""
        slots = np.flatnonzero((tables.counter >= 0) & (tables.tenant_tag == tag))
        records = [(slot, tables.record(slot)) for slot in slots.tolist()]
        open_slots = [slot for slot, record in records if record.state is TableState.OPEN]
        limits = np.minimum(tables.limit[open_slots], self.spec.max_model_len)
        left = -(-limits // self.spec.block_size) - tables.length[open_slots]
        # Who shares its open block copies it, but for the last.
        copies = sum(record.shared_index >= 0 for _, record in records)
        return int(np.maximum(left, 0).sum()) + copies


def unsheltered(pool: BlockPool, tenancy: Tenancy, grants: Grants, count: int) -> tuple[int, int]:
    """Returns how many of `count` blocks a gateway may have for growth, and on whose behalf they are taken.

    A gateway that is left with one sequence has nobody to preempt: floors and pins yield to it, a little at a time.
    """
    free = pool.available_block_count - tenancy.sheltered(NOBODY)
    if free > 0 or len(grants.tables) != 1 or grants.leased:
        return min(count, free), NOBODY
    return min(count, _LAST_RESORT_GRANT), LAST_RESORT
