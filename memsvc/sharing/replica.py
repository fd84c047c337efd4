"""`Replica`: what a pool caches, followed from outside through its journal."""

from __future__ import annotations

import dataclasses

from memsvc.sharing import records
from memsvc.sharing.records import RecordKind
from memsvc.store.base import JournalPosition, JournalStore, split_identities

_READ_ENTRIES = 512


@dataclasses.dataclass(frozen=True, slots=True)
class CachedBlock:
    """A block that can be matched."""

    identity: bytes
    index: int
    """Position in its sequence, 0 for the first."""


class Replica:
    """Follows one pool. After `catch_up` it equals the writer's state of a moment in that call, whatever was missed.

    Args:
        journals: where the journal is.
        pool_id: the pool.

    Attributes:
        blocks: what can be matched, by block id.
        snapshot_count: times that the state was read as a whole.
    """

    def __init__(self, journals: JournalStore, pool_id: str) -> None:
        self._journals = journals
        self._pool_id = pool_id
        self._position: JournalPosition | None = None
        self.blocks: dict[int, CachedBlock] = {}
        self.snapshot_count = 0

    async def catch_up(self) -> bool:
        """Reads all there is; false, with nothing known, if the pool has no journal now.

        Raises:
            StoreUnavailableError: the store does not answer; what is known stays.
            CorruptionError: an entry cannot be read; the next call starts from a snapshot.
        """
        while True:
            read = await self._journals.read(self._pool_id, self._position, _READ_ENTRIES)
            self._position = None
            if read is None:
                self.blocks.clear()
                return False
            if read.snapshot is not None:
                self.blocks.clear()
                self.snapshot_count += 1
            for entry in [*(read.snapshot or []), *read.entries]:
                self._apply(entry)
            self._position = read.position
            if len(read.entries) < _READ_ENTRIES:
                return True

    def _apply(self, entry: bytes) -> None:
        for record in records.decode(entry):
            blocks = record.blocks.tolist()
            if record.kind == RecordKind.CLEARED:
                self.blocks.clear()
            elif record.kind == RecordKind.REMOVED:
                for block in blocks:
                    self.blocks.pop(block, None)
            else:
                identities = split_identities(record.identities)
                for block, identity, index in zip(blocks, identities, record.indexes.tolist(), strict=True):
                    self.blocks[block] = CachedBlock(identity, index)
