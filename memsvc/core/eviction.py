"""In which order blocks that nobody uses are taken when some of them are retained or belong to a tenant with a floor.

Blocks wait in lanes: one for each tenant with a floor and each class of retention that is in use. Within a lane they
are in order of release, which is also their order of worth and of expiry (`memsvc.core.retention`): a lane never has to
be sorted, and the next block to take is at the head of one of them.

    lane (no floor, not retained)      b b b b b
    lane (no floor, priority 50)       x x | b b          x: expired, as good as not retained
    lane (tenant 3, not retained)      b b b
                                       ^ heads

Entering, leaving and expiring cost O(1) a block; taking costs the heads of the lanes that are not empty.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import numpy as np
import numpy.typing as npt

from memsvc.core import retention as classes
from memsvc.core.free_order import BlockIds

_CAPACITY_MINIMUM: Final = 64
_SCAN_MINIMUM: Final = 64
_EMPTY: Final[BlockIds] = np.zeros(0, np.int64)

_UNRETAINED, _RETAINED, PINNED_RANK = 0, 1, 2


@dataclasses.dataclass(slots=True)
class Lane:
    """Blocks of one kind in order of release. An entry is live while the block has the entry's ticket.

    Attributes:
        floored: number of the tenant that has a floor, 0 for those that have none.
        retention: class of retention.
        blocks: `[entry]` block ids.
        tickets: `[entry]` beside them.
        head: entries before this one are stale.
        tail: end of the entries.
        expired: entries before this one have expired.
    """

    floored: int
    retention: int
    blocks: BlockIds = dataclasses.field(default_factory=lambda: np.zeros(_CAPACITY_MINIMUM, np.int64))
    tickets: BlockIds = dataclasses.field(default_factory=lambda: np.zeros(_CAPACITY_MINIMUM, np.int64))
    head: int = 0
    tail: int = 0
    expired: int = 0

    def put(self, blocks: BlockIds, tickets: npt.NDArray[np.int64], live: npt.NDArray[np.int64]) -> None:
        """Appends entries; `live` is the ticket that each block has."""
        if self.tail + len(blocks) > len(self.blocks):
            self._make_room(len(blocks), live)
        end = self.tail + len(blocks)
        self.blocks[self.tail : end] = blocks
        self.tickets[self.tail : end] = tickets
        self.tail = end

    def first(self, count: int, live: npt.NDArray[np.int64], start: int = 0) -> npt.NDArray[np.int64]:
        """Returns the places of the first `count` live entries from `start` on, or of all."""
        found: list[npt.NDArray[np.int64]] = []
        at, missing = max(start, self.head), count
        while missing > 0 and at < self.tail:
            end = min(self.tail, at + max(_SCAN_MINIMUM, 2 * missing))
            places = np.flatnonzero(live[self.blocks[at:end]] == self.tickets[at:end])[:missing] + at
            found.append(places)
            missing -= len(places)
            at = end
        if not found:
            return _EMPTY
        return found[0] if len(found) == 1 else np.concatenate(found)

    def trim(self, live: npt.NDArray[np.int64]) -> bool:
        """Forgets the stale entries at the head; returns whether any is left."""
        places = self.first(1, live)
        self.head = int(places[0]) if len(places) else self.tail
        return bool(len(places))

    def _make_room(self, count: int, live: npt.NDArray[np.int64]) -> None:
        """Drops stale entries, and doubles the columns if more than half is live."""
        places = self.first(self.tail - self.head, live)
        blocks, tickets = self.blocks[places], self.tickets[places]
        self.expired = int(np.count_nonzero(places < self.expired))
        capacity = len(self.blocks)
        while 2 * (len(blocks) + count) > capacity:
            capacity *= 2
        self.blocks, self.tickets = np.zeros(capacity, np.int64), np.zeros(capacity, np.int64)
        self.blocks[: len(blocks)], self.tickets[: len(blocks)] = blocks, tickets
        self.head, self.tail = 0, len(blocks)


class EvictionLanes:
    """The lanes of one pool.

    Args:
        block_count: blocks of the pool, the null block included.
        since: `[block]` when the block was released, in seconds of the caller's clock.
    """

    __slots__ = ("_lanes", "_ticket", "_tickets", "since")

    def __init__(self, block_count: int, since: npt.NDArray[np.float64]) -> None:
        self.since = since
        # Of each block here, a number that rises with every entry; 0 for a block that is not here.
        self._ticket = np.zeros(block_count, np.int64)
        self._tickets = 0
        self._lanes: dict[tuple[int, int], Lane] = {}

    def put(self, blocks: BlockIds, floored: npt.NDArray[np.int64], retention: npt.NDArray[np.uint8]) -> None:
        """Appends `blocks`, none of which is here, in the order given.

        Args:
            blocks: block ids.
            floored: beside `blocks`: number of the tenant if it has a floor, else 0.
            retention: beside `blocks`: class of retention.
        """
        tickets = np.arange(self._tickets + 1, self._tickets + 1 + len(blocks))
        self._tickets += len(blocks)
        self._ticket[blocks] = tickets
        kinds = floored * 256 + retention
        if (kinds == kinds[0]).all():
            self._lane(int(kinds[0])).put(blocks, tickets, self._ticket)
            return
        for kind in np.unique(kinds).tolist():
            mine = kinds == kind
            self._lane(kind).put(blocks[mine], tickets[mine], self._ticket)

    def remove(self, blocks: BlockIds) -> None:
        """Takes `blocks`, all of which are here, out of the order."""
        self._ticket[blocks] = 0

    def all(self) -> BlockIds:
        """Returns the blocks here in order of release."""
        here = np.flatnonzero(self._ticket)
        return here[np.argsort(self._ticket[here])]

    def clear(self) -> None:
        """Takes everything out."""
        self._lanes.clear()
        self._ticket[:] = 0

    def holds(self, blocks: BlockIds) -> npt.NDArray[np.bool_]:
        """Returns which of `blocks` are here."""
        here: npt.NDArray[np.bool_] = self._ticket[blocks] > 0
        return here

    def expire(self, now: float) -> BlockIds:
        """Returns the blocks here whose time to live has passed since the last call; they stay in their place."""
        gone: list[BlockIds] = []
        for lane in self._lanes.values():
            if lane.retention in {classes.NONE, classes.PINNED}:
                continue
            limit = now - classes.time_to_live(lane.retention)
            count = 1
            while True:
                places = lane.first(count, self._ticket, lane.expired)
                old = places[self.since[lane.blocks[places]] <= limit]
                if len(old) < len(places) or len(places) < count:
                    break
                count *= 4
            if len(old):
                gone.append(lane.blocks[old])
                lane.expired = int(old[-1]) + 1
        return np.concatenate(gone) if gone else _EMPTY

    def trim(self) -> None:
        """Forgets stale entries and lanes that are empty, so that to look at the heads costs what is there."""
        for key, lane in list(self._lanes.items()):
            if not lane.trim(self._ticket):
                del self._lanes[key]

    def candidates(self, count: int, *, retained: bool, pinned: bool = False) -> tuple[BlockIds, BlockIds]:
        """Returns at most `count` blocks of each lane, sorted into the order in which they are to be taken.

        Args:
            count: how many of each lane.
            retained: those included that are retained and have not expired.
            pinned: those included that are pinned, after all others.

        Returns:
            The blocks, and beside them whether they are retained (1) or pinned (2).
        """
        found: list[BlockIds] = []
        ranks: list[npt.NDArray[np.int64]] = []
        keys: list[npt.NDArray[np.float64]] = []
        for lane in self._lanes.values():
            places = lane.first(count, self._ticket)
            if not len(places):
                continue
            if lane.retention == classes.PINNED:
                if not pinned:
                    continue
                rank, worth = np.full(len(places), PINNED_RANK), np.zeros(len(places))
            elif lane.retention == classes.NONE:
                rank, worth = np.full(len(places), _UNRETAINED), np.zeros(len(places))
            else:
                rank = np.where(places < lane.expired, _UNRETAINED, _RETAINED)
                if not retained:
                    places = places[rank == _UNRETAINED]
                    rank = rank[: len(places)]
                worth = np.where(rank, self.since[lane.blocks[places]] + classes.head_start(lane.retention), 0.0)
            found.append(lane.blocks[places])
            ranks.append(rank)
            keys.append(worth)
        if not found:
            return _EMPTY, _EMPTY
        blocks, rank = np.concatenate(found), np.concatenate(ranks)
        if len(found) == 1:
            return blocks, rank
        order = np.lexsort((self._ticket[blocks], np.concatenate(keys), rank))
        return blocks[order], rank[order]

    def _lane(self, kind: int) -> Lane:
        """Returns the lane of a kind, tenant * 256 + class."""
        key = divmod(kind, 256)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = Lane(*key)
        return lane
