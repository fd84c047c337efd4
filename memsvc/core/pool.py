"""Where every block of a pool is: reference counts, generations, states, and the two free orders.

A block is in one state at a time:

      take           adopt
    FREE ----> LEASED ----> USED ----------> FREE or CACHED      the last reference was dropped
      ^           |         |  ^               |
      |  put_back |         v  | share         | take (evicted) or share
      +-----------+      PENDING               +----> USED

PENDING blocks are those that only tables of dead gateways name (or their leases): nobody may have them before the
executor's fence. Columns, not an object a block: every operation on many blocks is a few vector operations.
"""

from __future__ import annotations

import enum
import itertools

import numpy as np
import numpy.typing as npt

from memsvc.core.free_order import BlankOrder, BlockIds, CachedOrder
from memsvc.core.residency import ResidencySampler
from memsvc.core.tenancy import Tenancy
from quire import native
from quire.errors import BlockPoolExhaustedError, InvariantError

RETRY_AFTER_SECONDS = 0.05
AWAITED_SECONDS = 60.0
"""After so long what a preempted sequence gave up is like all that is cached: it may have been cancelled."""
_BLOCK_BYTES = 8


class BlockState(enum.IntEnum):
    """Where a block is; the numbers are those of `quire.memsvc.v1.BlockState`."""

    FREE = 1
    CACHED = 2
    USED = 3
    PENDING = 4
    LEASED = 5
    NULL = 6


_FREE, _CACHED, _USED, _PENDING, _LEASED, _NULL = (int(state) for state in BlockState)


class BlockPool:
    """The blocks of one pool. Block 0 is the null block and is never handed out.

    Args:
        block_count: blocks, the null block included; at least 2.

    Attributes:
        refs: `[block]` references: table entries, and copies whose source must stay.
        closing_refs: `[block]` how many of `refs` belong to closing tables.
        generation: `[block]` how often the block was given new content.
        state: `[block]` a BlockState.
        filled: `[block]` tokens at the head of the block whose keys and values are confirmed.
        lessee: `[block]` number of the gateway that holds it as a lease, 0 for none.
        tenant: `[block]` tag of the tenant that the content belongs to.
        since: `[block]` time of the last change of state, in seconds of the caller's clock.
        native: the same columns in the accelerator; None without one.
        tenancy: who holds and keeps what; None while no tenant has a quota and no block is retained.
        residencies: follows the lives of some blocks; None while nobody asked for that.
    """

    __slots__ = (
        "_awaited",
        "_blank",
        "_cached",
        "_closing",
        "_counts",
        "block_count",
        "closing_refs",
        "filled",
        "generation",
        "lessee",
        "native",
        "refs",
        "residencies",
        "since",
        "state",
        "tenancy",
        "tenant",
    )

    def __init__(self, block_count: int) -> None:
        self.block_count = block_count
        self.refs = np.zeros(block_count, np.int32)
        self.closing_refs = np.zeros(block_count, np.int32)
        self.generation = np.zeros(block_count, np.uint32)
        self.state = np.full(block_count, _FREE, np.uint8)
        self.state[0] = _NULL
        self.filled = np.zeros(block_count, np.uint8)
        self.lessee = np.zeros(block_count, np.int32)
        self.tenant = np.zeros(block_count, np.uint32)
        self.since = np.zeros(block_count, np.float64)
        self._blank = BlankOrder(block_count)
        self._cached: CachedOrder | Tenancy = CachedOrder(block_count)
        self.tenancy: Tenancy | None = None
        # Cached blocks that a preempted sequence will ask for again, and when they were given up: they go last.
        self._awaited: dict[int, float] = {}
        self.residencies: ResidencySampler | None = None
        self._counts = [0] * (_NULL + 1)
        self._counts[_FREE] = block_count - 1
        self._counts[_NULL] = 1
        # Sum of closing_refs: tells in O(1) that nothing is closing, which is the rule.
        self._closing = 0
        self.native: native.Blocks | None = None
        if native.accelerator is not None:
            columns = (self.refs, self.generation, self.state, self.filled, self.lessee, self.tenant, self.since)
            self.native = native.accelerator.Blocks(block_count, *columns)

    @property
    def usable_block_count(self) -> int:
        """Blocks that can be handed out at all."""
        return self.block_count - 1

    @property
    def available_block_count(self) -> int:
        """Blocks that can be handed out now."""
        return self._counts[_FREE] + self._counts[_CACHED]

    def count(self, state: BlockState) -> int:
        """Returns how many blocks are in `state`."""
        return self._counts[state]

    def free_order(self) -> list[int]:
        """Returns the blocks that can be handed out, in the order in which they will be."""
        order: list[int] = np.concatenate((self._blank.blocks(), self._cached.blocks())).tolist()
        return order + list(self._awaited)

    def require(self, needed: int, available: int | None = None) -> None:
        """Raises BlockPoolExhaustedError, with both numbers, if `needed` blocks cannot be taken now."""
        available = self.available_block_count if available is None else available
        if needed > available:
            raise BlockPoolExhaustedError(
                f"{needed} blocks are needed and {available} are available; {self._counts[_LEASED]} are leased and "
                f"{self._counts[_PENDING]} wait for a fence, of {self.usable_block_count}",
                metadata={
                    "needed_block_count": needed,
                    "available_block_count": available,
                    "leased_block_count": self._counts[_LEASED],
                    "pending_free_block_count": self._counts[_PENDING],
                    "usable_block_count": self.usable_block_count,
                },
                retry_after=RETRY_AFTER_SECONDS,
            )

    def take(self, count: int, now: float, *, lessee: int = 0, taker: int = 0) -> tuple[BlockIds, BlockIds]:
        """Takes `count` blocks, blank ones first, then cached ones, or none at all.

        Args:
            count: how many.
            now: the caller's clock.
            lessee: gateway to lease to; without one the blocks become USED with one reference each.
            taker: whom they are for, see `Tenancy.take`.

        Returns:
            The blocks, and those of them that were cached: the caller forgets their content.

        Raises:
            BlockPoolExhaustedError: fewer are available; nothing was changed.
        """
        self.require(count)
        blank = min(count, self._counts[_FREE])
        blocks = self._blank.take(blank)
        evicted = self._evict(count - blank, taker, now) if count > blank else blocks[:0]
        if count > blank:
            blocks = np.concatenate((blocks, evicted)) if blank else evicted
        self._counts[_FREE] -= blank
        self._counts[_CACHED] -= count - blank
        self._counts[_LEASED if lessee else _USED] += count
        if self.residencies is not None:
            self.residencies.taken(blocks, now)
        if self.native is not None:
            self.native.take(blocks, now, lessee)
            return blocks, evicted
        self.generation[blocks] += 1
        self.filled[blocks] = 0
        self.since[blocks] = now
        if lessee:
            self.state[blocks] = _LEASED
            self.lessee[blocks] = lessee
        else:
            self.state[blocks] = _USED
            self.refs[blocks] = 1
        return blocks, evicted

    def _evict(self, count: int, taker: int, now: float) -> BlockIds:
        """Takes `count` cached blocks: those that a preempted sequence waits for after all others."""
        awaited = self._awaited
        if not awaited:
            return self._cached.take(count, taker, now)
        stale = [block for block, since in awaited.items() if now - since > AWAITED_SECONDS]
        self._forsake(stale)
        others = min(count, self._counts[_CACHED] - len(awaited))
        taken = self._cached.take(others, taker, now) if others else np.zeros(0, np.int64)
        if others < count:
            last = list(itertools.islice(awaited, count - others))
            for block in last:
                del awaited[block]
            taken = np.concatenate((taken, np.array(last, np.int64)))
        return taken

    def _forsake(self, blocks: list[int]) -> None:
        """Nobody waits for `blocks` any more: they are like all cached ones."""
        if blocks:
            for block in blocks:
                del self._awaited[block]
            self._cached.put(np.array(blocks, np.int64))

    def _withdraw(self, blocks: BlockIds) -> None:
        """Takes cached blocks out of the order."""
        if self._awaited:
            there = np.array([self._awaited.pop(block, None) is not None for block in blocks.tolist()], bool)
            blocks = blocks[~there]
        self._cached.remove(blocks)

    def adopt(self, blocks: BlockIds, now: float) -> None:
        """Turns leased blocks into used ones with one reference each."""
        self.state[blocks] = _USED
        self.refs[blocks] = 1
        self.lessee[blocks] = 0
        self.since[blocks] = now
        self.count_adopted(len(blocks))

    def count_adopted(self, count: int) -> None:
        """Notes that the columns of `count` leased blocks say that they are used."""
        self._counts[_LEASED] -= count
        self._counts[_USED] += count

    def put_back(self, blocks: BlockIds, now: float) -> None:
        """Returns leased blocks, or those of a dead gateway after its fence, to the blank ones."""
        pending = int(np.count_nonzero(self.state[blocks] == _PENDING))
        self._counts[_PENDING] -= pending
        self._counts[_LEASED] -= len(blocks) - pending
        self._counts[_FREE] += len(blocks)
        self.state[blocks] = _FREE
        self.lessee[blocks] = 0
        self.since[blocks] = now
        self._blank.put(blocks)
        if self.residencies is not None:
            self.residencies.returned(blocks)

    def share(self, blocks: BlockIds, now: float) -> None:
        """Adds one reference to each of `blocks` (distinct; used, cached or pending)."""
        states = self.state[blocks]
        cached = blocks[states == _CACHED]
        if len(cached):
            self._withdraw(cached)
            self._counts[_CACHED] -= len(cached)
            self._counts[_USED] += len(cached)
            self.since[cached] = now
        if self._counts[_PENDING]:
            pending = int(np.count_nonzero(states == _PENDING))
            self._counts[_PENDING] -= pending
            self._counts[_USED] += pending
        self.refs[blocks] += 1
        self.state[blocks] = _USED
        if self.residencies is not None:
            self.residencies.accessed(blocks, now)

    def drop(
        self,
        blocks: BlockIds,
        reusable: np.ndarray[tuple[int], np.dtype[np.bool_]],
        now: float,
        *,
        awaited: bool = False,
    ) -> None:
        """Removes one reference from each of `blocks` (distinct), which fall back in the order given.

        Args:
            blocks: used or pending blocks.
            reusable: beside `blocks`: whether the content can be matched, so that the block stays cached.
            now: the caller's clock.
            awaited: a preempted sequence gives them up, and will ask for them again.

        Raises:
            InvariantError: a block has no reference left to remove.
        """
        if self.native is not None and not self._closing:
            fallen = self.native.drop(blocks, reusable, now)
            if fallen is not None:
                self._fall_back(*fallen, awaited=awaited, now=now)
                if self.residencies is not None:
                    gone = self.refs[blocks] == 0
                    self.residencies.released(blocks[gone], reusable[gone], now)
                return
        left = self.refs[blocks] - 1
        if len(left) and left.min() < 0:
            message = f"block {int(blocks[left.argmin()])} was freed twice: no table names it"
            raise InvariantError(message, metadata={"block_id": int(blocks[left.argmin()])})
        self.refs[blocks] = left
        last = left == 0
        if last.all():
            gone = blocks
        else:
            gone, reusable = blocks[last], reusable[last]
            if self._closing:
                self._settle(blocks[~last], now)
        if not len(gone):
            return
        if self._counts[_PENDING]:
            pending = int(np.count_nonzero(self.state[gone] == _PENDING))
            self._counts[_PENDING] -= pending
            self._counts[_USED] += pending
        self.since[gone] = now
        if self.residencies is not None:
            self.residencies.released(gone, reusable, now)
        self._counts[_USED] -= len(gone)
        cached = int(np.count_nonzero(reusable))
        self._counts[_CACHED] += cached
        self._counts[_FREE] += len(gone) - cached
        if cached != len(gone):
            blank = gone[~reusable]
            self.state[blank] = _FREE
            self._blank.put(blank)
            if self.tenancy is not None:
                self.tenancy.blanked(blank)
            gone = gone[reusable]
        if cached:
            self.state[gone] = _CACHED
            self._enter(gone, now, awaited=awaited)

    def _enter(self, blocks: BlockIds, now: float, *, awaited: bool) -> None:
        """Puts cached blocks into the order."""
        if awaited and self.tenancy is None:
            self._awaited.update(dict.fromkeys(blocks.tolist(), now))
        else:
            self._cached.put(blocks)

    def _fall_back(self, pending: int, blank: bytes, cached: bytes, *, awaited: bool, now: float) -> None:
        """Enters blocks, of which `pending` were pending and the rest used, into the orders and the counts."""
        back = (len(blank) + len(cached)) // _BLOCK_BYTES
        self._counts[_PENDING] -= pending
        self._counts[_USED] -= back - pending
        if blank:
            blocks = np.frombuffer(blank, np.int64)
            self._counts[_FREE] += len(blocks)
            self._blank.put(blocks)
            if self.tenancy is not None:
                self.tenancy.blanked(blocks)
        if cached:
            blocks = np.frombuffer(cached, np.int64)
            self._counts[_CACHED] += len(blocks)
            self._enter(blocks, now, awaited=awaited)

    def begin_closing(self, blocks: BlockIds, now: float) -> None:
        """Notes that one reference of each of `blocks` belongs to a table that waits for its fence."""
        self.closing_refs[blocks] += 1
        self._closing += len(blocks)
        self._settle(blocks, now)

    def end_closing(self, blocks: BlockIds) -> None:
        """Undoes `begin_closing`, right before the references are dropped."""
        self.closing_refs[blocks] -= 1
        self._closing -= len(blocks)

    def freeze_leases(self, lessee: int, now: float) -> BlockIds:
        """Turns the blocks leased to a dead gateway into pending ones and returns them."""
        blocks = np.flatnonzero(self.lessee == lessee)
        self.state[blocks] = _PENDING
        self.since[blocks] = now
        self._counts[_LEASED] -= len(blocks)
        self._counts[_PENDING] += len(blocks)
        return blocks

    def clear_cached(self, now: float) -> BlockIds:
        """Turns every cached block into a blank one and returns them, the least recently released first."""
        self._forsake(list(self._awaited))
        blocks = self._cached.blocks()
        self.discard_cached(blocks, now)
        return blocks

    def discard_cached(self, blocks: BlockIds, now: float) -> None:
        """Turns cached blocks into blank ones."""
        if self._awaited:
            self._forsake([block for block in blocks.tolist() if block in self._awaited])
        self._cached.discard(blocks)
        if self.residencies is not None:
            self.residencies.ended(blocks, now)
        self._blank.put(blocks)
        self.state[blocks] = _FREE
        self.since[blocks] = now
        self._counts[_CACHED] -= len(blocks)
        self._counts[_FREE] += len(blocks)

    def begin_tenancy(self, tenancy: Tenancy, numbers: npt.NDArray[np.int64]) -> None:
        """Has `tenancy` count and order the blocks of tenants from now on.

        Args:
            tenancy: a new one.
            numbers: `[block]` number of the tenant of each block that is in a table or cached.
        """
        self._forsake(list(self._awaited))
        tenancy.take_over(np.flatnonzero(self.refs), self._cached.blocks(), numbers)
        self._cached = self.tenancy = tenancy

    def _settle(self, blocks: BlockIds, now: float) -> None:
        """Marks used blocks pending if only closing tables name them."""
        lost = blocks[(self.state[blocks] == _USED) & (self.refs[blocks] == self.closing_refs[blocks])]
        self.state[lost] = _PENDING
        self.since[lost] = now
        self._counts[_USED] -= len(lost)
        self._counts[_PENDING] += len(lost)
