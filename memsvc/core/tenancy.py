"""Which blocks belong to which tenant, what each may hold and keep, and what is evicted for whom.

A tenant has a ceiling (most blocks that its sequences may hold), a floor (blocks, held and cached together, below which
others' pressure takes none), and quotas of blocks that it may retain and of blocks that an operator may pin for it.

A pool has this only from the first quota or the first retained block on; until then it costs a comparison with None.
It then stands in the place of the pool's `CachedOrder`, and so sees every block that begins or ceases to be cached.
Tenants never share a block, whatever they send: a block has one tenant, and is counted once however many of its tables
name it.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import numpy as np
import numpy.typing as npt

from memsvc.core import retention as classes
from memsvc.core.eviction import PINNED_RANK, EvictionLanes
from memsvc.core.free_order import BlockIds
from quire.errors import InvariantError

NOBODY: Final = 0
"""Taker of blocks on behalf of no tenant: growth leases."""
LAST_RESORT: Final = -1
"""Taker to whom every floor and pin yields: the only sequence that its gateway has, which nothing else can help."""

_CAPACITY_MINIMUM: Final = 16

Counts = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True)
class TenantQuota:
    """What a tenant may hold and keep of one pool, in blocks."""

    floor: int = 0
    """Others' pressure evicts nothing while the tenant has no more than this, held and cached."""
    ceiling: int | None = None
    """Most blocks that its sequences may hold; None for no limit."""
    retained: int | None = None
    """Most blocks that may be retained; None for the pool's default share."""
    pinned: int = 0
    """Most blocks that may be pinned."""

    @property
    def kept(self) -> int:
        """Blocks that nobody else can count on."""
        return max(self.floor, self.pinned)

    def within(self, usable: int) -> TenantQuota:
        """Returns this quota, cut to a pool of `usable` blocks."""
        ceiling = None if self.ceiling is None else min(self.ceiling, usable)
        retained = None if self.retained is None else min(self.retained, usable)
        return TenantQuota(min(self.floor, usable), ceiling, retained, min(self.pinned, usable))


NO_QUOTA: Final = TenantQuota()


@dataclasses.dataclass(frozen=True, slots=True)
class TenantUse:
    """What a tenant has of one pool, in blocks."""

    held: int
    """In at least one of its tables, those of dead gateways included."""
    cached: int
    """In no table, but matchable."""
    retained: int
    """Of those held and cached."""
    pinned: int
    """Of those held and cached."""


class Tenancy:
    """The tenants of one pool in one epoch.

    Args:
        block_count: blocks of the pool, the null block included.
        since: `[block]` when the block changed its state, kept by the pool.
        retained_default: blocks that a tenant may retain if its quota does not say.

    Attributes:
        owner: `[block]` number of the tenant of a block that is held or cached, else 0.
        retention: `[block]` class of retention, see `memsvc.core.retention`.
        held, cached, retained, pinned: `[tenant]` blocks.
        pinned_cached: `[tenant]` pinned blocks that are cached.
    """

    __slots__ = (
        "_lanes",
        "_numbers",
        "_pinned_total",
        "_quotas",
        "_retained_default",
        "_retained_total",
        "cached",
        "held",
        "owner",
        "pinned",
        "pinned_cached",
        "retained",
        "retention",
    )

    def __init__(self, block_count: int, since: npt.NDArray[np.float64], retained_default: int) -> None:
        self._retained_default = retained_default
        self._lanes = EvictionLanes(block_count, since)
        self._numbers: dict[int, int] = {}
        # Quotas that are not the default one, by number.
        self._quotas: dict[int, TenantQuota] = {}
        self._retained_total = 0
        self._pinned_total = 0
        self.owner = np.zeros(block_count, np.int64)
        self.retention = np.zeros(block_count, np.uint8)
        self.held = np.zeros(_CAPACITY_MINIMUM, np.int64)
        self.cached = np.zeros(_CAPACITY_MINIMUM, np.int64)
        self.retained = np.zeros(_CAPACITY_MINIMUM, np.int64)
        self.pinned = np.zeros(_CAPACITY_MINIMUM, np.int64)
        self.pinned_cached = np.zeros(_CAPACITY_MINIMUM, np.int64)

    def follow(self, since: npt.NDArray[np.float64]) -> None:
        """Looks at another column of times from now on, that of the pool that this is put into."""
        self._lanes.since = since

    # Who is who

    def number(self, tag: int) -> int:
        """Returns the number of a tenant, a new one if it has none."""
        number = self._numbers.get(tag)
        if number is None:
            number = len(self._numbers) + 1
            if number >= len(self.held):
                number = self._make_number()
            self._numbers[tag] = number
        return number

    def known(self, tag: int) -> int:
        """Returns the number of a tenant, 0 if it has none."""
        return self._numbers.get(tag, NOBODY)

    def numbers(self, tags: npt.NDArray[np.int64] | npt.NDArray[np.uint32]) -> Counts:
        """Returns the numbers of tenants that have blocks."""
        known = self._numbers
        return np.array([known[tag] for tag in tags.tolist()], np.int64)

    def use(self, tag: int) -> TenantUse:
        """Returns what a tenant has."""
        number = self.known(tag)
        columns = (self.held, self.cached, self.retained, self.pinned)
        return TenantUse(*(int(column[number]) if number else 0 for column in columns))

    def quota(self, number: int) -> TenantQuota:
        """Returns what a tenant may hold and keep."""
        return self._quotas.get(number, NO_QUOTA)

    def retained_limit(self, number: int) -> int:
        """Returns how many blocks a tenant may retain."""
        limit = self.quota(number).retained
        return self._retained_default if limit is None else limit

    def set_quota(self, tag: int, quota: TenantQuota) -> None:
        """Changes what a tenant may hold and keep. What it has beyond that stays until it is let go."""
        number = self.number(tag)
        floored = bool(self.quota(number).floor)
        if quota == NO_QUOTA:
            self._quotas.pop(number, None)
        else:
            self._quotas[number] = quota
        if floored != bool(quota.floor):
            # Rare, and the only time that blocks change their lane without leaving: all enter anew, in their order.
            blocks = self._lanes.all()
            self._lanes.clear()
            self._enter_lanes(blocks)

    # Blocks that enter and leave tables

    def take_over(self, held: BlockIds, cached: BlockIds, numbers: Counts) -> None:
        """Begins to count: `held` blocks are in tables, `cached` ones in none, in the order of eviction.

        Args:
            held: block ids.
            cached: block ids.
            numbers: `[block]` number of each block's tenant.
        """
        self.entered(held, numbers[held])
        self.owner[cached] = numbers[cached]
        np.add.at(self.cached, numbers[cached], 1)
        self._enter_lanes(cached)

    def entered(self, blocks: BlockIds, numbers: Counts | int) -> None:
        """Notes that fresh blocks are in tables of tenants now."""
        self.owner[blocks] = numbers
        np.add.at(self.held, self.owner[blocks], 1)

    def blanked(self, blocks: BlockIds) -> None:
        """Notes that blocks that were in tables hold nothing worth keeping."""
        np.subtract.at(self.held, self.owner[blocks], 1)
        self._forget(blocks)

    # The order of the cached blocks: what `CachedOrder` does

    def __len__(self) -> int:
        return int(self.cached.sum())

    def put(self, blocks: BlockIds) -> None:
        """Appends blocks that were in tables and are cached now, in the order given."""
        self._count(blocks, 1)
        self._enter_lanes(blocks)

    def remove(self, blocks: BlockIds) -> None:
        """Takes out cached blocks that are in tables again."""
        self._count(blocks, -1)
        self._lanes.remove(blocks)

    def discard(self, blocks: BlockIds) -> None:
        """Takes out cached blocks that hold nothing worth keeping any more."""
        self._evicted(blocks)

    def take(self, count: int, taker: int, now: float) -> BlockIds:
        """Removes and returns the first `count` blocks that may be taken; there are as many.

        Args:
            count: how many.
            taker: number of the tenant they are for, whose own floor does not matter; NOBODY; or LAST_RESORT.
            now: the caller's clock.
        """
        self.expire(now)
        self._lanes.trim()
        blocks = self._choose(count, taker, retained=False)
        if len(blocks) < count:
            blocks = self._choose(count, taker, retained=True)
        if len(blocks) < count:
            message = f"{count} cached blocks were to be taken and {len(blocks)} may be"
            raise InvariantError(message, metadata={"count": count})
        self._evicted(blocks)
        return blocks

    def blocks(self) -> BlockIds:
        """Returns all cached blocks in order, floors left aside."""
        blocks, _ = self._lanes.candidates(len(self), retained=True, pinned=True)
        return blocks

    def sheltered(self, taker: int) -> int:
        """Returns how many cached blocks may not be taken for `taker`: below others' floors, or pinned."""
        if taker == LAST_RESORT:
            return 0
        sheltered = int(self.pinned_cached.sum()) if self._pinned_total else 0
        for number, quota in self._quotas.items():
            if quota.floor and number != taker:
                plain = int(self.cached[number] - self.pinned_cached[number])
                sheltered += plain - min(plain, self._excess(number, quota))
        return sheltered

    def guaranteed(self, taker: int) -> int:
        """Returns how many blocks a tenant can never count on, since others' floors and pins keep them."""
        return sum(quota.kept for number, quota in self._quotas.items() if number != taker)

    # Retention

    def expire(self, now: float) -> None:
        """Lets go of retained blocks whose time to live is over."""
        if self._retained_total:
            self._release(self._lanes.expire(now))

    def retain(self, blocks: BlockIds, retention: int, number: int) -> None:
        """Retains blocks that are in a table, as far as the tenant's quota goes, those that come first preferred.

        A block that is retained more strongly stays as it is.
        """
        before = self.retention[blocks]
        new = blocks[before == classes.NONE]
        room = max(0, self.retained_limit(number) - int(self.retained[number]))
        new = new[:room]
        self.retention[blocks[(before != classes.NONE) & (before < retention)]] = retention
        self.retention[new] = retention
        self.retained[number] += len(new)
        self._retained_total += len(new)

    def let_go(self, blocks: BlockIds) -> None:
        """Ends the retention, or the pinning, of blocks; those cached come last among the blocks not retained."""
        kept = blocks[self.retention[blocks] != classes.NONE]
        if not len(kept):
            return
        cached = kept[self._lanes.holds(kept)]
        self._count_pinned_cached(cached, -1)
        self._release(kept)
        self._reorder(cached)

    def pin(self, blocks: BlockIds, number: int) -> None:
        """Pins blocks of a tenant, held or cached, which are not pinned yet."""
        self._release(blocks[self.retention[blocks] != classes.NONE])
        self.retention[blocks] = classes.PINNED
        self.pinned[number] += len(blocks)
        self._pinned_total += len(blocks)
        cached = blocks[self._lanes.holds(blocks)]
        self._count_pinned_cached(cached, 1)
        self._reorder(cached)

    def succeed(self, block: int, heir: int) -> None:
        """Keeps `heir`, which is in a table and not kept so far, in the place of a cached block with equal content."""
        kept, number = int(self.retention[block]), int(self.owner[heir])
        if kept == classes.NONE:
            return
        self.let_go(np.array([block]))
        self.retention[heir] = kept
        if kept == classes.PINNED:
            self.pinned[number] += 1
            self._pinned_total += 1
        else:
            self.retained[number] += 1
            self._retained_total += 1

    # Inside

    def _choose(self, count: int, taker: int, *, retained: bool) -> BlockIds:
        """Returns the first blocks, at most `count`, that may be taken."""
        last = taker == LAST_RESORT
        blocks, ranks = self._lanes.candidates(count, retained=retained, pinned=last and retained)
        floored = [(n, q) for n, q in self._quotas.items() if q.floor and n != taker]
        if not floored or not len(blocks):
            return blocks[:count]
        owners = self.owner[blocks]
        may = np.ones(len(blocks), np.bool_)
        for number, quota in floored:
            mine = np.flatnonzero(owners == number)
            may[mine[self._excess(number, quota) :]] = False
        if last and retained:
            # What a floor shelters comes after everything else, and what is pinned after that, but both come.
            return blocks[np.argsort(np.where(ranks == PINNED_RANK, 2, ~may), kind="stable")][:count]
        return blocks[may][:count]

    def _excess(self, number: int, quota: TenantQuota) -> int:
        """Returns how many blocks a tenant has above its floor."""
        return max(0, int(self.held[number] + self.cached[number]) - quota.floor)

    def _enter_lanes(self, blocks: BlockIds) -> None:
        if not len(blocks):
            return
        owners = self.owner[blocks]
        floored = np.zeros(len(blocks), np.int64)
        for number, quota in self._quotas.items():
            if quota.floor:
                floored[owners == number] = number
        self._lanes.put(blocks, floored, self.retention[blocks])

    def _reorder(self, blocks: BlockIds) -> None:
        """Has cached blocks enter anew: what they are has changed."""
        self._lanes.remove(blocks)
        self._enter_lanes(blocks)

    def _count(self, blocks: BlockIds, sign: int) -> None:
        """Counts blocks that go from held to cached (1) or back (-1)."""
        owners = self.owner[blocks]
        np.add.at(self.cached, owners, sign)
        np.subtract.at(self.held, owners, sign)
        self._count_pinned_cached(blocks, sign)

    def _count_pinned_cached(self, blocks: BlockIds, sign: int) -> None:
        if self._pinned_total:
            pinned = blocks[self.retention[blocks] == classes.PINNED]
            np.add.at(self.pinned_cached, self.owner[pinned], sign)

    def _evicted(self, blocks: BlockIds) -> None:
        np.subtract.at(self.cached, self.owner[blocks], 1)
        self._count_pinned_cached(blocks, -1)
        self._lanes.remove(blocks)
        self._forget(blocks)

    def _forget(self, blocks: BlockIds) -> None:
        """Notes that blocks belong to nobody."""
        if self._retained_total or self._pinned_total:
            self._release(blocks[self.retention[blocks] != classes.NONE])
        self.owner[blocks] = NOBODY

    def _release(self, blocks: BlockIds) -> None:
        """Counts blocks that are not retained or pinned any more."""
        if not len(blocks):
            return
        pinned = self.retention[blocks] == classes.PINNED
        owners = self.owner[blocks]
        np.subtract.at(self.retained, owners[~pinned], 1)
        np.subtract.at(self.pinned, owners[pinned], 1)
        count = int(np.count_nonzero(pinned))
        self._pinned_total -= count
        self._retained_total -= len(blocks) - count
        self.retention[blocks] = classes.NONE

    def _make_number(self) -> int:
        """Returns a number that nobody has: of a tenant that has nothing, or a new one in longer columns."""
        for tag, number in self._numbers.items():
            if not (self.held[number] or self.cached[number] or number in self._quotas):
                del self._numbers[tag]
                return number
        number = len(self.held)
        for name in ("held", "cached", "retained", "pinned", "pinned_cached"):
            column = getattr(self, name)
            setattr(self, name, np.concatenate((column, np.zeros(len(column), np.int64))))
        return number
