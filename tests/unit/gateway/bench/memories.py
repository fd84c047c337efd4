"""A memory in this process that keeps what it is told."""

from __future__ import annotations

from memsvc.bench import core
from memsvc.core.memory import MemoryCore
from memsvc.local import LocalMemory
from quire.memory import JournalEntry, MemoryEvent, PoolInfo


class Recording(LocalMemory):
    """A memory that keeps the journals it applies."""

    entries: list[JournalEntry]

    def journal(self, entry: JournalEntry) -> None:
        """Applies and keeps an entry."""
        super().journal(entry)
        self.entries.append(entry)


def ignore(event: MemoryEvent) -> None:
    """Hears what concerns a gateway."""


async def connected(block_size: int = 16) -> tuple[Recording, PoolInfo]:
    """Returns a memory in this process, and its pool."""
    memory = Recording(MemoryCore(bytes(32), lease_ttl=float("inf")))
    memory.entries = []
    memory.register_pool(core.POOL_ID, 1, "h:1", core.pool_spec(block_size))
    await memory.start(ignore)
    return memory, memory.core.pool(core.POOL_ID).info()
