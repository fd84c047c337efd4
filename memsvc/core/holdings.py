"""Looks at what gateways hold, and since when. Changes nothing."""

from __future__ import annotations

import dataclasses

import numpy as np

from memsvc.core.memory import MemoryCore


@dataclasses.dataclass(frozen=True, slots=True)
class Holding:
    """Blocks of one pool that a gateway holds: one table, or its growth lease (no sequence)."""

    pool_id: str
    gateway_id: str
    closing: bool
    sequence_id: str
    tenant: str
    block_count: int
    since: float


def holdings(core: MemoryCore, pool_id: str, before: float) -> list[Holding]:
    """Returns what is held since `before` or longer, the oldest first; of one pool, or of all if none is named.

    Raises:
        PoolNotFoundError: no such pool.
    """
    found: list[Holding] = []
    for name in [pool_id] if pool_id else sorted(core.pools):
        memory = core.pool(name).memory
        leased = np.flatnonzero(memory.pool.lessee)
        numbers, which = np.unique(memory.pool.lessee[leased], return_inverse=True)
        oldest = np.full(len(numbers), np.inf)
        np.minimum.at(oldest, which, memory.pool.since[leased])
        counts = np.bincount(which, minlength=len(numbers))
        rows = zip(numbers.tolist(), counts.tolist(), oldest.tolist(), strict=True)
        found += [_holding(core, name, number, count, since) for number, count, since in rows]
        for slot in memory.tables.open_slots():
            record = memory.tables.record(slot)
            count = len(record.held_block_ids())
            held = _holding(core, name, record.gateway, count, record.opened_at)
            found.append(dataclasses.replace(held, sequence_id=record.sequence_id, tenant=record.tenant))
    found = [one for one in found if one.since <= before]
    return sorted(found, key=lambda one: (one.since, one.pool_id, one.gateway_id, one.sequence_id))


def _holding(core: MemoryCore, pool_id: str, number: int, count: int, since: float) -> Holding:
    """Returns what a gateway holds in no table."""
    gateway = core.gateway(number)
    return Holding(pool_id, gateway.gateway_id, gateway.closed, "", "", count, since)
