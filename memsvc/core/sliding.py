"""Tables in pools whose models attend over a sliding window: how they begin, and what they let go of as it moves.

`quire.window` has the rule, and why a block that is outside needs no fence.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import numpy as np

from memsvc.core.table import Slots
from quire.memory import PoolSpec
from quire.window import outside_block_count

if TYPE_CHECKING:
    from memsvc.core.pool_memory import PoolMemory


def entry_count(spec: PoolSpec, block_count: int, released_count: int) -> int:
    """Returns how many entries a table begins with, null ones included.

    Those that the first token to compute reads, and its own. The others come from the lease, as the tokens are computed
    and what is outside the window returns.

    Args:
        spec: the pool; without a window the table begins with all of its blocks.
        block_count: blocks of all its tokens.
        released_count: leading entries that are null.
    """
    return min(block_count, released_count + spec.sequence_block_limit) if spec.window else block_count


def release_outside(memory: PoolMemory, slots: Slots, now: float) -> None:
    """Drops the blocks of tables that lie outside the window, and makes their entries null.

    What is committed stays cached. Depends on nothing but the written counts, so the gateway comes to the same.

    Args:
        memory: a pool with a window.
        slots: tables whose written counts may have moved.
        now: the caller's clock.
    """
    tables, size = memory.tables, memory.spec.block_size
    due = slots[tables.written[slots] - memory.window + 1 >= (tables.released[slots] + 1) * size]
    starts, counts = tables.released[due].tolist(), tables.written[due].tolist()
    for slot, start, written in zip(due.tolist(), starts, counts, strict=True):
        end = outside_block_count(written, memory.window, size)
        record = tables.record(slot)
        offered = [record.merges.pop(index) for index in range(start, end) if index in record.merges]
        blocks = np.array([*record.blocks[start:end], *offered])
        record.blocks[start:end] = array("q", bytes(8 * (end - start)))
        tables.released[slot] = end
        memory.pool.drop(blocks, memory.settle(blocks), now)
