"""Prefixes that are being computed: which open table will publish the next block of a prompt.

A prompt that begins like one that was admitted a moment ago finds nothing in the cache: nothing matches before the
executor has confirmed that it is written. Who waits for that moment computes and holds only the rest.

A table is entered under the identity of its last published block, or its root digest, and the tokens of the full block
that comes next. A prompt that matched up to that identity and goes on with these tokens finds it: nothing is hashed for
it. The key moves on with every block that the table publishes, and is gone when no full block of its known tokens is
left, or the table is. Only a hint: what differs in more than tokens (`TableRecord.extras`) is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from memsvc.core.content import PrefixMatch
from memsvc.core.journal import Column
from memsvc.core.pool import RETRY_AFTER_SECONDS
from memsvc.core.table import TableRecord
from quire.errors import PrefixPendingError
from quire.memory import AdmitRequest

if TYPE_CHECKING:
    from memsvc.core.pool_memory import PoolMemory

_TOKEN_BYTES = 4


class PendingPrefixes:
    """The tables with known full blocks that are not published yet."""

    __slots__ = ("_keys", "_tables")

    def __init__(self) -> None:
        self._keys: dict[int, bytes] = {}
        # The dictionaries stand for sets that keep their order.
        self._tables: dict[bytes, dict[int, None]] = {}

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._keys)

    def __contains__(self, table: int) -> bool:
        """Whether a table is entered."""
        return table in self._keys

    def enter(self, table: int, key: bytes) -> None:
        """Enters a table, or moves it to another key."""
        if self._keys.get(table) != key:
            self.leave(table)
            self._keys[table] = key
            self._tables.setdefault(key, {})[table] = None

    def leave(self, table: int) -> None:
        """Forgets a table; a no-op for one that is not entered."""
        key = self._keys.pop(table, None)
        if key is None:
            return
        tables = self._tables[key]
        del tables[table]
        if not tables:
            del self._tables[key]

    def find(self, key: bytes) -> int:
        """Returns the table that was under `key` first, or 0."""
        return next(iter(self._tables.get(key, ())), 0)


def note(memory: PoolMemory, slot: int, record: TableRecord) -> None:
    """Enters a table by the full block that it publishes next; takes it out if its tokens fill none."""
    size, index = memory.spec.block_size, int(memory.tables.committed[slot])
    if record.publishes and not record.extras and (index + 1) * size <= memory.tables.tokens[slot]:
        if index < len(record.blocks):
            memory.pending.enter(record.table, record.parent + memory.prefix.tokens[record.blocks[index]].tobytes())
    else:
        memory.pending.leave(record.table)


def follow(memory: PoolMemory, tables: Column | bytes) -> None:
    """Moves tables on to the block that they publish next; `tables` is a column of a journal, maybe as it travels."""
    for table in (np.frombuffer(tables, "<u4") if isinstance(tables, bytes) else tables).tolist():
        if table in memory.pending:
            slot = memory.tables.slot(table)
            note(memory, slot, memory.tables.record(slot))


def look_up(memory: PoolMemory, request: AdmitRequest, match: PrefixMatch, cached: int) -> int:
    """Returns how many tokens behind the `cached` ones an open table is about to publish.

    Raises:
        PrefixPendingError: there are some, and the request is to wait for them.
    """
    size, full = memory.spec.block_size, len(match.blocks)
    start = full * size * _TOKEN_BYTES
    table = memory.pending.find(match.identity + request.token_ids[start : start + size * _TOKEN_BYTES])
    if not table or request.skip_cache_read:
        return 0
    slot = memory.tables.slot(table)
    held = memory.tables.record(slot).blocks
    # One token is left to compute, as by a match.
    limit = min((len(request.token_ids) // _TOKEN_BYTES - 1) // size, int(memory.tables.tokens[slot]) // size)
    if limit <= full:
        return 0
    blocks = np.array(held[full : min(limit, len(held))], np.int64)
    words = np.frombuffer(request.token_ids, "<u4", len(blocks) * size, start).reshape(-1, size)
    equal = (memory.prefix.tokens[blocks] == words).all(axis=1)
    count = len(blocks) if equal.all() else int(equal.argmin())
    token_count = (full + count) * size
    if token_count > cached and request.wait_for_prefix:
        raise PrefixPendingError(
            f"{token_count - cached} tokens behind {cached} that are cached are being computed by table {table}",
            metadata={"table": table, "token_count": token_count, "cached_token_count": cached},
            retry_after=RETRY_AFTER_SECONDS,
        )
    return max(0, token_count - cached)
