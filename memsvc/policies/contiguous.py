"""The policies that reserve a whole sequence at admission, as one extent or as scattered blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from memsvc.policies.buddy import BuddyAllocator
from memsvc.policies.interface import Wish
from quire.errors import BlockPoolExhaustedError, PromptTooLongError
from quire.memory import Admission, JournalEntry, PoolInfo, PoolSpec
from quire.units import div_ceil


class Extents(Protocol):
    """Hands out runs of blocks, or sets of them. Blocks are counted from 0."""

    def allocate(self, block_count: int) -> list[int] | None:
        """Returns `block_count` blocks or more, or None when there is no room of that shape."""
        ...

    def free(self, blocks: list[int]) -> None:
        """Takes back what one call of `allocate` returned."""
        ...


class FixedExtents:
    """A pool cut into equal extents once and for all: no search, no outer fragmentation but the remainder.

    Args:
        pool_block_count: blocks of the pool.
        extent_block_count: blocks of an extent.
    """

    def __init__(self, pool_block_count: int, extent_block_count: int) -> None:
        self._extent = extent_block_count
        self._free = list(range(pool_block_count // extent_block_count - 1, -1, -1))

    def allocate(self, block_count: int) -> list[int] | None:
        """See Extents."""
        assert block_count <= self._extent, (block_count, self._extent)
        if not self._free:
            return None
        first = self._free.pop() * self._extent
        return list(range(first, first + self._extent))

    def free(self, blocks: list[int]) -> None:
        """See Extents."""
        self._free.append(blocks[0] // self._extent)


class ScatteredBlocks:
    """Any free blocks, wherever they are.

    Args:
        pool_block_count: blocks of the pool.
    """

    def __init__(self, pool_block_count: int) -> None:
        self._free = list(range(pool_block_count - 1, -1, -1))

    def allocate(self, block_count: int) -> list[int] | None:
        """See Extents."""
        if block_count > len(self._free):
            return None
        cut = len(self._free) - block_count
        taken, self._free = self._free[cut:], self._free[:cut]
        return taken[::-1]

    def free(self, blocks: list[int]) -> None:
        """See Extents."""
        self._free += blocks


class BuddyExtents:
    """Runs from a buddy allocator, whose sizes are powers of two of a block.

    Args:
        pool_block_count: blocks of the pool.
    """

    def __init__(self, pool_block_count: int) -> None:
        self._buddy = BuddyAllocator(pool_block_count)

    def allocate(self, block_count: int) -> list[int] | None:
        """See Extents."""
        first = self._buddy.allocate(block_count)
        return None if first is None else list(range(first, first + self._buddy.size_of(first)))

    def free(self, blocks: list[int]) -> None:
        """See Extents."""
        self._buddy.free(blocks[0])


class Reserving:
    """Reserves at admission all that a sequence may ever need; it never grows and is never preempted.

    Args:
        pool: the pool; of its blocks, the null block is not handed out.
        extents: what blocks come from.
        reservation: tokens that a wish reserves, prompt included.
    """

    def __init__(self, pool: PoolInfo, extents: Extents, reservation: Callable[[Wish], int]) -> None:
        self._pool = pool
        self._extents = extents
        self._reservation = reservation
        self._tables: dict[int, list[int]] = {}
        self._table_count = 0

    @property
    def pool(self) -> PoolInfo:
        """See Policy."""
        return self._pool

    def admit(self, wish: Wish) -> Admission:
        """See Policy."""
        spec = self._pool.spec
        needed = div_ceil(self._reservation(wish), spec.block_size)
        blocks = self._extents.allocate(needed)
        if blocks is None:
            if not self._tables:
                message = (
                    f"token_ids: a reservation of {needed} blocks is more than the pool can give of its "
                    f"{spec.usable_block_count}"
                )
                raise PromptTooLongError(message, field="token_ids")
            message = f"no free extent of {needed} blocks among {len(self._tables)} reservations"
            raise BlockPoolExhaustedError(message, metadata={"needed_block_count": needed})
        self._table_count += 1
        self._tables[self._table_count] = blocks
        # Block 0 is the null block everywhere else: ids begin at 1 here too.
        return Admission(self._pool.epoch, self._table_count, [block + 1 for block in blocks], 0, [])

    def lease(self, granted_total: int) -> list[int]:
        """See Policy: nothing ever grows."""
        del granted_total
        return []

    def journal(self, entry: JournalEntry) -> None:
        """See Policy."""
        for table in entry.closed:
            self._extents.free(self._tables.pop(table))

    def shared_block_count(self) -> int:
        """See Policy: nothing is shared."""
        return 0


def contiguous(pool: PoolInfo) -> Reserving:
    """Returns the policy that reserves `max_model_len` slots in one extent."""
    longest = pool.spec.max_model_len
    extents = FixedExtents(pool.spec.usable_block_count, div_ceil(longest, pool.spec.block_size))
    return Reserving(pool, extents, lambda _: longest)


def contiguous_pow2(pool: PoolInfo) -> Reserving:
    """Returns Orca (Pow2): prompt, and the true output rounded up to a power of two, from a buddy allocator."""
    return Reserving(
        pool,
        BuddyExtents(pool.spec.usable_block_count),
        lambda wish: min(pool.spec.max_model_len, wish.prompt_length + _power_of_two(wish.output_length)),
    )


def contiguous_oracle(pool: PoolInfo) -> Reserving:
    """Returns Orca (Oracle): exactly what the sequence will need, from a buddy allocator."""
    return Reserving(
        pool, BuddyExtents(pool.spec.usable_block_count), lambda wish: wish.prompt_length + wish.output_length
    )


def reserve(pool: PoolInfo) -> Reserving:
    """Returns the policy that reserves blocks for the prompt and `max_new_tokens`, anywhere in the pool."""
    return Reserving(
        pool,
        ScatteredBlocks(pool.spec.usable_block_count),
        lambda wish: len(wish.request.token_ids) // 4 + wish.request.max_new_tokens,
    )


def _power_of_two(count: int) -> int:
    """Returns the least power of two that is at least `count`."""
    return 1 << max(0, count - 1).bit_length()


def reserving_pool(spec: PoolSpec) -> PoolInfo:
    """Returns a pool for a policy that needs no memory service."""
    return PoolInfo("simulated", 1, True, spec, "simulated:0", 1)
