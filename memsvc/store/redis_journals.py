"""Journals as Redis streams.

For each pool: a hash `head` (what the journal should look like), the stream `entries` whose ids are the entries'
numbers, and a list with the pieces of the snapshot. The head names the list, so that a new snapshot is written aside
and appears in one instant. Every script compares the lengths of stream and list with the head: what was trimmed or
flushed behind our back is noticed by the writer, which begins again, and never read as if it were whole.
"""

from __future__ import annotations

from collections.abc import Sequence
import secrets

from memsvc.store.base import JournalPosition, JournalRead, StoreFencedError
from memsvc.store.connection import Argument, RedisConnection, Script

# What no writer renews is dropped after this. Renewals come every second or so.
_RETENTION_MILLISECONDS = 3_600_000
_STAGING_MILLISECONDS = 60_000

_HEAD = """
local function intact(head)
  local at = redis.call('HMGET', head, 'life', 'last', 'floor', 'snapshot', 'pieces', 'snapshot_at', 'base')
  if not at[1] then return nil end
  local found = {life = at[1], last = tonumber(at[2]), floor = tonumber(at[3]), snapshot = at[7] .. at[4],
                 pieces = tonumber(at[5]), snapshot_at = tonumber(at[6]), entries = at[7] .. 'entries'}
  if redis.call('XLEN', found.entries) ~= found.last - found.floor then return nil end
  if redis.call('LLEN', found.snapshot) ~= found.pieces then return nil end
  return found
end
local function extend(found, milliseconds)
  redis.call('PEXPIRE', KEYS[1], milliseconds)
  redis.call('PEXPIRE', found.entries, milliseconds)
  redis.call('PEXPIRE', found.snapshot, milliseconds)
end
"""
_STAGE = Script("""
local length = redis.call('RPUSH', KEYS[1], unpack(ARGV, 2))
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return length
""")
_BEGIN = Script("""
local base, epoch, life, snapshot, pieces = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local held = redis.call('HMGET', KEYS[1], 'epoch', 'snapshot')
if held[1] and tonumber(held[1]) > tonumber(epoch) then return 0 end
if redis.call('LLEN', base .. snapshot) ~= tonumber(pieces) then return 0 end
if held[2] then redis.call('UNLINK', base .. held[2]) end
redis.call('UNLINK', base .. 'entries', KEYS[1])
redis.call('HSET', KEYS[1], 'epoch', epoch, 'life', life, 'last', 0, 'floor', 0, 'snapshot', snapshot,
           'pieces', pieces, 'snapshot_at', 0, 'base', base)
redis.call('PEXPIRE', KEYS[1], ARGV[6])
redis.call('PEXPIRE', base .. snapshot, ARGV[6])
return 1
""")
_APPEND = Script(
    _HEAD
    + """
local journal, before = intact(KEYS[1]), tonumber(ARGV[2])
if not journal or journal.life ~= ARGV[1] then return 0 end
local count = #ARGV - 3
if journal.last == before + count then return 1 end
if journal.last ~= before then return 0 end
for number = 1, count do
  redis.call('XADD', journal.entries, string.format('%d-0', before + number), 'e', ARGV[number + 3])
end
redis.call('HSET', KEYS[1], 'last', string.format('%d', before + count))
extend(journal, ARGV[3])
return 1
"""
)
_CHECKPOINT = Script(
    _HEAD
    + """
local journal, sequence = intact(KEYS[1]), tonumber(ARGV[2])
if not journal or journal.life ~= ARGV[1] or journal.last ~= sequence then return 0 end
local base, snapshot, pieces, keep = ARGV[4], ARGV[5], ARGV[6], tonumber(ARGV[7])
if redis.call('LLEN', base .. snapshot) ~= tonumber(pieces) then return 0 end
redis.call('UNLINK', journal.snapshot)
redis.call('XTRIM', journal.entries, 'MAXLEN', keep)
local floor = math.max(journal.floor, sequence - keep)
redis.call('HSET', KEYS[1], 'snapshot', snapshot, 'pieces', pieces, 'snapshot_at', ARGV[2],
           'floor', string.format('%d', floor))
journal.snapshot = base .. snapshot
extend(journal, ARGV[3])
return 1
"""
)
_RENEW = Script(
    _HEAD
    + """
local journal = intact(KEYS[1])
if not journal or journal.life ~= ARGV[1] or journal.last ~= tonumber(ARGV[2]) then return 0 end
extend(journal, ARGV[3])
return 1
"""
)
_END = Script("""
local held = redis.call('HMGET', KEYS[1], 'life', 'snapshot', 'base')
if held[1] ~= ARGV[1] then return 0 end
redis.call('UNLINK', KEYS[1], held[3] .. 'entries', held[3] .. held[2])
return 1
""")
_READ = Script(
    _HEAD
    + """
local journal, position = intact(KEYS[1]), tonumber(ARGV[2])
if not journal then return {} end
local pieces = false
if ARGV[1] ~= journal.life or position < journal.floor or position > journal.last then
  if journal.snapshot_at < journal.floor then return {} end
  pieces = redis.call('LRANGE', journal.snapshot, 0, -1)
  position = journal.snapshot_at
end
local entries = {}
local start = string.format('(%d-0', position)
for _, item in ipairs(redis.call('XRANGE', journal.entries, start, '+', 'COUNT', ARGV[3])) do
  entries[#entries + 1] = item[2][2]
end
return {journal.life, string.format('%d', position + #entries), entries, pieces}
"""
)


class RedisJournals:
    """Implements `JournalStore` on a server.

    Args:
        connection: to the server.
    """

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection

    async def begin(self, pool_id: str, epoch: int, life: str, snapshot: Sequence[bytes]) -> None:
        """See `JournalStore.begin`."""
        staged = await self._stage(pool_id, snapshot)
        arguments: list[Argument] = [_base(pool_id), epoch, life, staged, len(snapshot), _RETENTION_MILLISECONDS]
        _require(await self._connection.run(_BEGIN, [_head(pool_id)], arguments), pool_id)

    async def append(self, pool_id: str, life: str, sequence: int, entries: Sequence[bytes]) -> None:
        """See `JournalStore.append`."""
        arguments: list[Argument] = [life, sequence, _RETENTION_MILLISECONDS, *entries]
        _require(await self._connection.run(_APPEND, [_head(pool_id)], arguments), pool_id)

    async def checkpoint(self, pool_id: str, life: str, sequence: int, snapshot: Sequence[bytes], keep: int) -> None:
        """See `JournalStore.checkpoint`."""
        staged = await self._stage(pool_id, snapshot)
        arguments: list[Argument] = [
            life,
            sequence,
            _RETENTION_MILLISECONDS,
            _base(pool_id),
            staged,
            len(snapshot),
            keep,
        ]
        _require(await self._connection.run(_CHECKPOINT, [_head(pool_id)], arguments), pool_id)

    async def renew(self, pool_id: str, life: str, sequence: int) -> None:
        """See `JournalStore.renew`."""
        arguments: list[Argument] = [life, sequence, _RETENTION_MILLISECONDS]
        _require(await self._connection.run(_RENEW, [_head(pool_id)], arguments), pool_id)

    async def end(self, pool_id: str, life: str) -> None:
        """See `JournalStore.end`."""
        await self._connection.run(_END, [_head(pool_id)], [life])

    async def read(self, pool_id: str, position: JournalPosition | None, limit: int) -> JournalRead | None:
        """See `JournalStore.read`."""
        known = position if position is not None else JournalPosition("", 0)
        found = await self._connection.run(_READ, [_head(pool_id)], [known.life, known.sequence, limit])
        if not found:
            return None
        life, sequence, entries, pieces = found
        return JournalRead(JournalPosition(life.decode(), int(sequence)), pieces, entries)

    async def _stage(self, pool_id: str, snapshot: Sequence[bytes]) -> str:
        """Writes a snapshot where nobody looks yet, and returns its name within the journal."""
        name = f"snapshot:{secrets.token_hex(8)}"
        for piece in snapshot:
            await self._connection.run(_STAGE, [_base(pool_id) + name], [_STAGING_MILLISECONDS, piece])
        return name


def _base(pool_id: str) -> str:
    return f"quire:{{journal/{pool_id}}}:"


def _head(pool_id: str) -> str:
    return _base(pool_id) + "head"


def _require(done: object, pool_id: str) -> None:
    if not done:
        raise StoreFencedError(f"the journal of pool {pool_id!r} is not where this writer left it")
