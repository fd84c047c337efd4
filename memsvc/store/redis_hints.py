"""Hints in bucketed Redis hashes.

For each space a hash `index` (epoch, generation, bucket_count, next_tag, cursor), the leases `owner:TAG` with a TTL,
`owners` (tag -> capacity), `pools` (pool -> tag), `updates` (tag -> how many), and the buckets `GENERATION:NUMBER`:
hashes from 14 bytes of an identity to the 2-byte tags of those who hold it. Small hashes with short values are one
packed list each on the server, which is what makes an entry cost some 20 bytes instead of 100.

A bucket is meant to hold 64 entries at most. When a pool joins for which there is no room, the index begins again with
more buckets: the epoch changes, and every writer finds its ticket void and writes its hints again, as after a flush.
"""

from __future__ import annotations

import dataclasses
import json
import secrets

from memsvc.store.base import HintMatch, HintOwner, HintTicket, StoreFencedError
from memsvc.store.connection import Argument, RedisConnection, Script

BUCKET_ENTRIES = 64
_FIRST_BUCKET_COUNT = 64
_BUCKET_COUNT_MAXIMUM = 1 << 24
_SWEEP_BUCKETS = 32
_RETIRED_AT_ONCE = 256

# A growth leaves room for three times what is there, so that few follow.
_JOIN = Script("""
local base, fresh, pool, capacity, ttl, record = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5], ARGV[6]
local room, first, most = tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
local index = base .. 'index'
local held = redis.call('HMGET', index, 'epoch', 'generation', 'bucket_count')
local epoch, generation, buckets = held[1], tonumber(held[2] or '0'), tonumber(held[3] or '0')
local before = redis.call('HGET', base .. 'pools', pool)
if before then redis.call('DEL', base .. 'owner:' .. before) end
local needed, owners = capacity, redis.call('HGETALL', base .. 'owners')
for at = 1, #owners, 2 do
  if redis.call('EXISTS', base .. 'owner:' .. owners[at]) == 1 then needed = needed + tonumber(owners[at + 1]) end
end
if not epoch or (needed > buckets * room and buckets < most) then
  if epoch then redis.call('RPUSH', base .. 'retired', string.format('%d:%d', generation, buckets)) end
  epoch, generation, buckets = fresh, generation + 1, first
  while buckets * room < 3 * needed and buckets < most do buckets = buckets * 2 end
  redis.call('UNLINK', base .. 'owners', base .. 'pools', base .. 'updates', base .. 'dead')
  redis.call('HSET', index, 'epoch', epoch, 'generation', generation, 'bucket_count', buckets, 'cursor', 0)
end
local tag
repeat
  tag = (redis.call('HINCRBY', index, 'next_tag', 1) - 1) % 65535 + 1
until redis.call('HEXISTS', base .. 'owners', tag) == 0
redis.call('HSET', base .. 'owners', tag, capacity)
redis.call('HSET', base .. 'pools', pool, tag)
redis.call('HSET', base .. 'updates', tag, 0)
redis.call('SET', base .. 'owner:' .. tag, record, 'PX', ttl)
return {epoch, tag, generation, buckets}
""")
_CHECK_TICKET = """
local base, epoch, tag, count = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local lease = base .. 'owner:' .. tag
if redis.call('HGET', KEYS[1], 'epoch') ~= epoch then return 0 end
if redis.call('HGET', base .. 'updates', tag) ~= count then return 0 end
if redis.call('EXISTS', lease) == 0 then return 0 end
"""
_UPDATE = Script(
    _CHECK_TICKET
    + """
redis.call('HINCRBY', base .. 'updates', tag, 1)
local generation, buckets = ARGV[5], tonumber(ARGV[6])
local mark = struct.pack('<H', tonumber(tag))
local lives = {[mark] = true}
local function live(other)
  if lives[other] == nil then
    lives[other] = redis.call('EXISTS', base .. 'owner:' .. struct.unpack('<H', other)) == 1
  end
  return lives[other]
end
local function place(blob, at)
  local one, two, three = string.byte(blob, at, at + 2)
  local bucket = (one * 65536 + two * 256 + three) % buckets
  return base .. generation .. ':' .. string.format('%d', bucket), string.sub(blob, at + 2, at + 15)
end
local function without(value)
  local kept = {}
  for at = 1, #value, 2 do
    local other = string.sub(value, at, at + 1)
    if other ~= mark and live(other) then kept[#kept + 1] = other end
  end
  return table.concat(kept)
end
for at = 1, #ARGV[7], 16 do
  local key, field = place(ARGV[7], at)
  local value = redis.call('HGET', key, field)
  redis.call('HSET', key, field, (value and without(value) or '') .. mark)
end
for at = 1, #ARGV[8], 16 do
  local key, field = place(ARGV[8], at)
  local value = redis.call('HGET', key, field)
  if value then
    local rest = without(value)
    if rest == '' then redis.call('HDEL', key, field) else redis.call('HSET', key, field, rest) end
  end
end
return 1
"""
)
_RENEW = Script(
    _CHECK_TICKET
    + """
redis.call('PEXPIRE', lease, ARGV[5])
return 1
"""
)
_LEAVE = Script("""
if redis.call('HGET', KEYS[1], 'epoch') == ARGV[2] then redis.call('DEL', ARGV[1] .. 'owner:' .. ARGV[3]) end
return 1
""")
# Finds for each owner the deepest entry that names it, by bisection wherever two probed depths differ. After 512
# probes what is not settled counts as the shallower depth.
_FIND = Script("""
local base, blob = ARGV[1], ARGV[2]
local held = redis.call('HMGET', KEYS[1], 'generation', 'bucket_count')
if not held[1] then return {} end
local prefix, buckets = base .. held[1] .. ':', tonumber(held[2])
local records, probed, probe_count = {}, {}, 0
local function record(mark)
  if records[mark] == nil then records[mark] = redis.call('GET', base .. 'owner:' .. struct.unpack('<H', mark)) end
  return records[mark]
end
local function owners(depth)
  if probed[depth] then return probed[depth] end
  probe_count = probe_count + 1
  local at = depth * 16 - 15
  local one, two, three = string.byte(blob, at, at + 2)
  local key = prefix .. string.format('%d', (one * 65536 + two * 256 + three) % buckets)
  local value = redis.call('HGET', key, string.sub(blob, at + 2, at + 15))
  local found = {}
  if value then
    for offset = 1, #value, 2 do
      local mark = string.sub(value, offset, offset + 1)
      if record(mark) then found[mark] = true end
    end
  end
  probed[depth] = found
  return found
end
local answer = {}
local function settle(low, high, marks)
  if #marks == 0 then return end
  if high - low == 1 or probe_count >= 512 then
    for _, mark in ipairs(marks) do answer[#answer + 1] = {string.format('%d', low), record(mark)} end
    return
  end
  local middle = math.floor((low + high) / 2)
  local there, shallow, deep = owners(middle), {}, {}
  for _, mark in ipairs(marks) do
    if there[mark] then deep[#deep + 1] = mark else shallow[#shallow + 1] = mark end
  end
  settle(low, middle, shallow)
  settle(middle, high, deep)
end
local count = math.floor(#blob / 16)
if count == 0 then return answer end
local candidates = {}
for mark in pairs(owners(1)) do candidates[#candidates + 1] = mark end
if #candidates == 0 then return answer end
local last, open = owners(count), {}
for _, mark in ipairs(candidates) do
  if last[mark] then answer[#answer + 1] = {string.format('%d', count), record(mark)} else open[#open + 1] = mark end
end
settle(1, count, open)
return answer
""")
# A dead tag is noted with the position of the sweep, and forgotten when the sweep has come round.
_SWEEP = Script("""
local base, budget, unlinked = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local index = base .. 'index'
local held = redis.call('HMGET', index, 'generation', 'bucket_count', 'cursor')
if not held[1] then return 0 end
local retired = redis.call('LINDEX', base .. 'retired', 0)
if retired then
  local generation, left = string.match(retired, '(%d+):(%d+)')
  left = tonumber(left)
  local stop = math.max(0, left - unlinked)
  for number = stop, left - 1 do
    redis.call('UNLINK', base .. generation .. ':' .. string.format('%d', number))
  end
  if stop == 0 then redis.call('LPOP', base .. 'retired')
  else redis.call('LSET', base .. 'retired', 0, generation .. ':' .. string.format('%d', stop)) end
  return 1
end
local generation, buckets, cursor = held[1], tonumber(held[2]), tonumber(held[3])
local lives, dead_count = {}, 0
for _, tag in ipairs(redis.call('HKEYS', base .. 'owners')) do
  local live = redis.call('EXISTS', base .. 'owner:' .. tag) == 1
  lives[struct.pack('<H', tonumber(tag))] = live
  if not live then
    dead_count = dead_count + 1
    redis.call('HSETNX', base .. 'dead', tag, cursor)
  end
end
if dead_count == 0 then return 0 end
for number = cursor, cursor + budget - 1 do
  local key = base .. generation .. ':' .. string.format('%d', number % buckets)
  local entries = redis.call('HGETALL', key)
  for at = 1, #entries, 2 do
    local value, kept = entries[at + 1], {}
    for offset = 1, #value, 2 do
      local mark = string.sub(value, offset, offset + 1)
      if lives[mark] then kept[#kept + 1] = mark end
    end
    if #kept == 0 then redis.call('HDEL', key, entries[at])
    elseif #kept * 2 < #value then redis.call('HSET', key, entries[at], table.concat(kept)) end
  end
end
cursor = cursor + budget
redis.call('HSET', index, 'cursor', string.format('%d', cursor))
local noted = redis.call('HGETALL', base .. 'dead')
for at = 1, #noted, 2 do
  if cursor - tonumber(noted[at + 1]) >= buckets then
    redis.call('HDEL', base .. 'dead', noted[at])
    redis.call('HDEL', base .. 'owners', noted[at])
    redis.call('HDEL', base .. 'updates', noted[at])
    dead_count = dead_count - 1
  end
end
return dead_count > 0 and 1 or 0
""")


class RedisHints:
    """Implements `HintStore` on a server.

    Args:
        connection: to the server.
    """

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection

    async def join(self, space: str, owner: HintOwner, capacity: int, ttl: float) -> HintTicket:
        """See `HintStore.join`."""
        record = json.dumps(dataclasses.asdict(owner), separators=(",", ":"))
        arguments: list[Argument] = [
            *(_base(space), secrets.token_hex(8), owner.pool_id, max(1, capacity), _milliseconds(ttl), record),
            *(BUCKET_ENTRIES, _FIRST_BUCKET_COUNT, _BUCKET_COUNT_MAXIMUM),
        ]
        epoch, tag, generation, buckets = await self._connection.run(_JOIN, [_index(space)], arguments)
        return HintTicket(space, epoch.decode(), int(tag), int(generation), int(buckets))

    async def update(self, ticket: HintTicket, update_count: int, added: bytes, removed: bytes) -> None:
        """See `HintStore.update`."""
        arguments: list[Argument] = [
            *_claim(ticket, update_count),
            ticket.generation,
            ticket.bucket_count,
            added,
            removed,
        ]
        _require(await self._connection.run(_UPDATE, [_index(ticket.space)], arguments))

    async def renew(self, ticket: HintTicket, update_count: int, ttl: float) -> None:
        """See `HintStore.renew`."""
        arguments: list[Argument] = [*_claim(ticket, update_count), _milliseconds(ttl)]
        _require(await self._connection.run(_RENEW, [_index(ticket.space)], arguments))

    async def leave(self, ticket: HintTicket) -> None:
        """See `HintStore.leave`."""
        await self._connection.run(_LEAVE, [_index(ticket.space)], _claim(ticket, 0)[:3])

    async def find(self, space: str, identities: bytes) -> list[HintMatch]:
        """See `HintStore.find`."""
        found = await self._connection.run(_FIND, [_index(space)], [_base(space), identities])
        return [HintMatch(HintOwner(**json.loads(record)), int(depth)) for depth, record in found]

    async def sweep(self, space: str) -> bool:
        """See `HintStore.sweep`."""
        arguments: list[Argument] = [_base(space), _SWEEP_BUCKETS, _RETIRED_AT_ONCE]
        return bool(await self._connection.run(_SWEEP, [_index(space)], arguments))


def _base(space: str) -> str:
    return f"quire:{{hints/{space}}}:"


def _index(space: str) -> str:
    return _base(space) + "index"


def _milliseconds(seconds: float) -> int:
    return max(1, int(seconds * 1000))


def _claim(ticket: HintTicket, update_count: int) -> list[Argument]:
    return [_base(ticket.space), ticket.epoch, ticket.tag, update_count]


def _require(done: object) -> None:
    if not done:
        raise StoreFencedError("the hint index is not as this writer left it")
