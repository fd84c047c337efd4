"""Who may write into open blocks that forked tables share: copy at the first write, in place for the last holder.

`quire.memory.Memory.fork` opens tables that name the same blocks. The last of these may be partly filled. Before a
table writes into it the gateway asks `must_copy`; if so it takes a block from its growth lease, plans a copy and the
new entry (`StepPlan.copies`, `StepPlan.appended`), tells memsvc (`JournalEntry.replaced`), and notes it by `left`. The
answer holds from the step on that is planned next: the executor applies removals and copies before it writes.
"""

from __future__ import annotations

from collections.abc import Iterable


class SharedTails:
    """The partly filled last blocks that several tables of one pool name.

    A table is in here as long as it may not write into its last block. Whoever is left alone drops out by itself.
    """

    def __init__(self) -> None:
        """Starts with nothing shared."""
        self._holders: dict[int, set[int]] = {}
        self._block: dict[int, int] = {}

    def __len__(self) -> int:
        """Tables that would have to copy before they write."""
        return len(self._block)

    def forked(self, source: int, children: Iterable[int], block: int, *, must_copy: bool) -> None:
        """Notes a fork in the middle of a block; one at the end of a block shares nothing that is written again.

        Args:
            source: table that was forked.
            children: tables that were opened.
            block: the last of `Fork.block_ids`.
            must_copy: as `Fork` says it.
        """
        if must_copy:
            # The block is full: it has no holders among which one could be the last.
            self._block.update((child, block) for child in children)
            return
        tables = {source, *children}
        self._holders.setdefault(block, set()).update(tables)
        self._block.update((table, block) for table in tables)

    def must_copy(self, table: int) -> bool:
        """Whether a table has to put a copy in the place of its last block before it writes there."""
        return table in self._block

    def left(self, table: int) -> int:
        """Notes that a table names its last block no more: it was copied, or the table's removal is planned.

        Returns:
            The table that holds the block alone now, and may write into it; 0 if there is none.
        """
        block = self._block.pop(table, None)
        holders = self._holders.get(block) if block is not None else None
        if block is None or holders is None:
            return 0
        holders.discard(table)
        if len(holders) > 1:
            return 0
        del self._holders[block]
        alone = holders.pop() if holders else 0
        self._block.pop(alone, None)
        return alone

    def clear(self) -> None:
        """Forgets everything: the tables are void."""
        self._holders.clear()
        self._block.clear()
