"""In which order blocks that nobody uses are taken again.

Both orders are flat columns with a moving head and tail, so that many blocks enter and leave in a few vector
operations. A block leaves the middle of `CachedOrder` in O(1): its entry goes stale and is skipped later.
"""

import numpy as np
import numpy.typing as npt

BlockIds = npt.NDArray[np.int64]

_SCAN_MINIMUM = 64


class BlankOrder:
    """First-in first-out order of the blocks with nothing worth keeping; at first 1, 2, 3, ... ascending.

    Args:
        block_count: blocks of the pool, the null block included.
    """

    __slots__ = ("_block_count", "_buffer", "_fresh", "_head", "_tail")

    def __init__(self, block_count: int) -> None:
        self._block_count = block_count
        # Blocks never used so far are [fresh, block_count): they are ahead of all that came back.
        self._fresh = 1
        self._buffer = np.zeros(2 * block_count, np.int32)
        self._head = 0
        self._tail = 0

    def __len__(self) -> int:
        return self._block_count - self._fresh + self._tail - self._head

    def take(self, count: int) -> BlockIds:
        """Removes and returns the first `count` blocks; there are as many."""
        fresh = min(count, self._block_count - self._fresh)
        first, self._fresh = self._fresh, self._fresh + fresh
        if fresh == count:
            return np.arange(first, first + count, dtype=np.int64)
        rest = count - fresh
        assert self._head + rest <= self._tail, (count, len(self))
        back = self._buffer[self._head : self._head + rest].astype(np.int64)
        self._head += rest
        return back if not fresh else np.concatenate((np.arange(first, first + fresh, dtype=np.int64), back))

    def put(self, blocks: BlockIds) -> None:
        """Appends `blocks` in the order given."""
        if self._tail + len(blocks) > len(self._buffer):
            kept = self._tail - self._head
            self._buffer[:kept] = self._buffer[self._head : self._tail].copy()
            self._head, self._tail = 0, kept
        self._buffer[self._tail : self._tail + len(blocks)] = blocks
        self._tail += len(blocks)

    def blocks(self) -> BlockIds:
        """Returns all blocks in order."""
        fresh = np.arange(self._fresh, self._block_count, dtype=np.int64)
        return np.concatenate((fresh, self._buffer[self._head : self._tail].astype(np.int64)))


class CachedOrder:
    """Order of the unreferenced blocks whose content can be matched: least recently released first.

    Args:
        block_count: blocks of the pool, the null block included.
    """

    __slots__ = ("_buffer", "_count", "_head", "_position", "_tail")

    def __init__(self, block_count: int) -> None:
        self._buffer = np.zeros(2 * block_count, np.int32)
        # Index into the buffer plus one, 0 for a block that is not here. An entry is live if it points back.
        self._position = np.zeros(block_count, np.int32)
        self._head = 0
        self._tail = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, blocks: BlockIds) -> None:
        """Appends `blocks`, none of which is here, in the order given."""
        if self._tail + len(blocks) > len(self._buffer):
            self._compact()
        end = self._tail + len(blocks)
        self._buffer[self._tail : end] = blocks
        self._position[blocks] = np.arange(self._tail + 1, end + 1)
        self._tail = end
        self._count += len(blocks)

    def remove(self, blocks: BlockIds) -> None:
        """Takes `blocks`, all of which are here, out of the order."""
        self._position[blocks] = 0
        self._count -= len(blocks)

    def discard(self, blocks: BlockIds) -> None:
        """Takes `blocks`, all of which are here, out of the order: they hold nothing worth keeping any more."""
        self.remove(blocks)

    def take(self, count: int, taker: int = 0, now: float = 0.0) -> BlockIds:  # noqa: ARG002 - see `Tenancy.take`
        """Removes and returns the first `count` blocks; there are as many."""
        assert count <= self._count, (count, self._count)
        found: list[BlockIds] = []
        missing = count
        while missing:
            assert self._head < self._tail, (count, self._count)
            end = min(self._tail, self._head + max(_SCAN_MINIMUM, 2 * missing))
            live = self._live(self._head, end)[:missing]
            blocks = self._buffer[live].astype(np.int64)
            found.append(blocks)
            missing -= len(blocks)
            self._head = int(live[-1]) + 1 if not missing else end
        taken = found[0] if len(found) == 1 else np.concatenate(found)
        self.remove(taken)
        return taken

    def blocks(self) -> BlockIds:
        """Returns all blocks in order."""
        return self._buffer[self._live(self._head, self._tail)].astype(np.int64)

    def _live(self, start: int, end: int) -> BlockIds:
        """Returns the indexes in [start, end) whose entries are not stale."""
        entries = self._buffer[start:end]
        return np.flatnonzero(self._position[entries] == np.arange(start + 1, end + 1)) + start

    def _compact(self) -> None:
        """Moves the live entries to the front. Half of the buffer at least is stale or free by then."""
        blocks = self.blocks()
        self._buffer[: len(blocks)] = blocks
        self._position[blocks] = np.arange(1, len(blocks) + 1)
        self._head, self._tail = 0, len(blocks)
