"""Journals of the usual kind, applied by the accelerator: see `quire.native`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memsvc.core.content import FreshContent
from memsvc.core.journal import Journal
from quire import native

if TYPE_CHECKING:
    from memsvc.core.pool_memory import PoolMemory


def apply_rows(
    memory: PoolMemory, gateway: int, journal: Journal, now: float, token_limit: int, block_limit: int
) -> bool:
    """Applies the growth and the rows of a journal; false, with nothing changed, if not all in it is as usual.

    Args:
        memory: what it is applied to.
        gateway: number of the gateway whose journal it is.
        journal: the journal, of which the closed tables and the returned blocks are the caller's.
        now: the caller's clock.
        token_limit: most tokens of a table.
        block_limit: most blocks of a table.
    """
    accelerator, blocks, index = native.accelerator, memory.pool.native, memory.prefix.native
    if accelerator is None or blocks is None or index is None or memory.shared or len(journal.replaced):
        # What is shared by forks, and whatever takes the place of a block, is told in rows that are not usual.
        return False
    found = memory.tables.hold(accelerator).apply(
        *(blocks, index, gateway, now, token_limit, block_limit),
        *(journal.tables, journal.token_starts, journal.token_counts, journal.written_counts),
        *(journal.token_ids, journal.appended),
    )
    if found is None:
        return False
    growth_count, *fresh = found
    if growth_count:
        memory.pool.count_adopted(growth_count)
        memory.grants_of(gateway).leased -= growth_count
        if memory.tenancy is not None:
            blocks_grown = journal.columns().appended[:, 2]
            memory.tenancy.entered(blocks_grown, memory.tenancy.numbers(memory.pool.tenant[blocks_grown]))
    if fresh[0]:
        memory.publish(FreshContent(*fresh), lambda: memory.tables.slots(journal.columns().tables), now)
    return True
