"""A multi-map from digests to blocks, in two flat columns.

The caller keeps the digests and compares them; this only finds candidates. Many blocks enter or leave in a few vector
operations; those whose buckets collide are handled one by one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from memsvc.core.events import Digests
from memsvc.core.free_order import BlockIds
from quire.errors import InvariantError


class DigestChains:
    """Hash buckets that hold chains of blocks, the newest first.

    Args:
        block_count: blocks of the pool.
        scratch: that of other chains of as many blocks, to share it.
    """

    __slots__ = ("_head_column", "_heads", "_mask", "_next", "_next_column", "_scratch")

    def __init__(self, block_count: int, scratch: npt.NDArray[np.int32] | None = None) -> None:
        size = 1 << max(4, (block_count - 1).bit_length())
        self._mask = size - 1
        # The same memory twice: columns for many values at once, views for one, which take half the time.
        self._head_column = np.zeros(size, np.int32)
        self._next_column = np.zeros(block_count, np.int32)
        self._heads = self._head_column.data
        self._next = self._next_column.data
        self._scratch = np.zeros(size, np.int32) if scratch is None else scratch

    @property
    def columns(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """The newest block of each bucket, and the block after each block in its chain."""
        return self._head_column, self._next_column

    @property
    def scratch(self) -> npt.NDArray[np.int32]:
        """Room to work in, which chains of equally many blocks can share."""
        return self._scratch

    def candidates(self, digest: bytes) -> Iterator[int]:
        """Yields the blocks that may belong to `digest`, the newest first."""
        block = self._heads[int.from_bytes(digest[:8], "little") & self._mask]
        while block:
            yield block
            block = self._next[block]

    def link(self, digest: bytes, block: int) -> None:
        """Adds `block`, which is not linked."""
        self._link(int.from_bytes(digest[:8], "little") & self._mask, block)

    def unlink(self, digest: bytes, block: int) -> None:
        """Removes `block`, which was linked under `digest`."""
        self._unlink(int.from_bytes(digest[:8], "little") & self._mask, block)

    def link_many(self, digests: Digests, blocks: BlockIds) -> None:
        """Adds `blocks`, none of which is linked; those later in the order come to be newer."""
        buckets = self._buckets(digests)
        first = self._first_of_each(buckets)
        heads, following = self._head_column, self._next_column
        if first.all():
            following[blocks] = heads[buckets]
            heads[buckets] = blocks
            return
        ahead, at = blocks[first], buckets[first]
        following[ahead] = heads[at]
        heads[at] = ahead
        for bucket, block in zip(buckets[~first].tolist(), blocks[~first].tolist(), strict=True):
            self._link(bucket, block)

    def unlink_many(self, digests: Digests, blocks: BlockIds) -> None:
        """Removes `blocks`, each linked under its digest."""
        buckets = self._buckets(digests)
        heads = self._head_column
        # At the head of its chain is at most one block of a bucket.
        top = heads[buckets] == blocks
        heads[buckets[top]] = self._next_column[blocks[top]]
        if not top.all():
            for bucket, block in zip(buckets[~top].tolist(), blocks[~top].tolist(), strict=True):
                self._unlink(bucket, block)

    def find_many(self, digests: Digests, columns: Digests, usable: npt.NDArray[np.bool_]) -> BlockIds:
        """Returns, for each of `digests`, the newest usable block with that digest, or 0.

        Args:
            digests: what is looked for.
            columns: `[block, 2]` digest of each block.
            usable: `[block]` whether it may be found.
        """
        found = np.zeros(len(digests), np.int64)
        at = self._head_column[self._buckets(digests)].astype(np.int64)
        rows = np.flatnonzero(at)
        while len(rows):
            blocks = at[rows]
            hit = usable[blocks] & (columns[blocks] == digests[rows]).all(axis=1)
            found[rows[hit]] = blocks[hit]
            rows = rows[~hit]
            at[rows] = self._next_column[at[rows]]
            rows = rows[at[rows] != 0]
        return found

    def _buckets(self, digests: Digests) -> npt.NDArray[np.int64]:
        return (digests[:, 0] & np.uint64(self._mask)).astype(np.int64)

    def _first_of_each(self, buckets: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Returns which entries are one, and only one, of their bucket's."""
        order = np.arange(len(buckets), dtype=np.int32)
        self._scratch[buckets[::-1]] = order[::-1]
        first: npt.NDArray[np.bool_] = self._scratch[buckets] == order
        return first

    def _link(self, bucket: int, block: int) -> None:
        self._next[block] = self._heads[bucket]
        self._heads[bucket] = block

    def _unlink(self, bucket: int, block: int) -> None:
        following = self._next
        at = self._heads[bucket]
        if at == block:
            self._heads[bucket] = following[block]
            return
        while at and following[at] != block:
            at = following[at]
        if not at:
            message = f"block {block} is not linked under its digest"
            raise InvariantError(message, metadata={"block_id": block})
        following[at] = following[block]
