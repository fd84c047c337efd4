"""The shared store on Redis, Valkey or a Cluster of them.

All keys of the directory carry the hash tag {memsvc}, those of one journal {journal/POOL}, those of one hint index
{hints/SPACE}: what one script touches lies on one node of a cluster.

The directory has a life, a random text that is checked first by every script: when it is not the one known, the
directory was emptied or set back, and everybody writes again what is theirs.
"""

from __future__ import annotations

import secrets
from typing import Any

import structlog

from memsvc.store.base import ServiceRecord
from memsvc.store.connection import TIMEOUT_SECONDS, Argument, RedisConnection, Script
from memsvc.store.credentials import Credentials
from memsvc.store.redis_hints import RedisHints
from memsvc.store.redis_journals import RedisJournals
from quire.errors import StoreUnavailableError

log = structlog.get_logger(__name__)

_PREFIX = "quire:{memsvc}"
_ATTEMPTS = 3

# ARGV[1] is the life that the caller knows, ARGV[2] one to begin if there is none.
_CHECK_LIFE = """
local life = redis.call('GET', KEYS[1])
if not life then
  life = ARGV[2]
  redis.call('SET', KEYS[1], life)
end
if life ~= ARGV[1] then return {'OTHER_LIFE', life} end
"""
_RAISE_EPOCH = Script(
    _CHECK_LIFE
    + """
local stored = tonumber(redis.call('GET', KEYS[2]) or '0')
local epoch = math.max(stored, tonumber(ARGV[3])) + 1
redis.call('SET', KEYS[2], string.format('%d', epoch))
return epoch
"""
)
_KEEP_EPOCH = Script(
    _CHECK_LIFE
    + """
local stored = tonumber(redis.call('GET', KEYS[2]) or '0')
if tonumber(ARGV[3]) > stored then redis.call('SET', KEYS[2], ARGV[3]) end
return 1
"""
)
_ANNOUNCE = Script(
    _CHECK_LIFE
    + """
local nonce = redis.call('HGET', KEYS[2], 'nonce')
if nonce and nonce ~= ARGV[3] and ARGV[8] == '0' then return 0 end
redis.call('HSET', KEYS[2], 'nonce', ARGV[3], 'address', ARGV[4], 'space', ARGV[5])
redis.call('PEXPIRE', KEYS[2], ARGV[6])
redis.call('SADD', KEYS[3], ARGV[7])
return 1
"""
)
_WITHDRAW = Script(
    _CHECK_LIFE
    + """
if redis.call('HGET', KEYS[2], 'nonce') ~= ARGV[3] then return 0 end
redis.call('DEL', KEYS[2])
redis.call('SREM', KEYS[3], ARGV[4])
return 1
"""
)
_SERVICES = Script(
    _CHECK_LIFE
    + """
local found = {}
for _, name in ipairs(redis.call('SMEMBERS', KEYS[2])) do
  local held = redis.call('HMGET', KEYS[3] .. name, 'nonce', 'address', 'space')
  if held[1] then
    found[#found + 1] = {name, held[1], held[2], held[3] or ''}
  else
    redis.call('SREM', KEYS[2], name)
  end
end
return found
"""
)


class RedisStore:
    """Implements `Store` on a server.

    Args:
        url: redis://[user:password@]host:port/db; rediss:// for TLS, redis+cluster:// and rediss+cluster:// for any
            node of a Cluster.
        credentials: instead of those in the URL.
        timeout: seconds that the server has to connect or to answer.

    Raises:
        ConfigError, ValueError: the address or the credentials cannot be.
    """

    def __init__(self, url: str, credentials: Credentials | None = None, *, timeout: float = TIMEOUT_SECONDS) -> None:
        self._connection = RedisConnection(url, credentials or Credentials(), timeout)
        self._life = ""
        self.journals = RedisJournals(self._connection)
        self.hints = RedisHints(self._connection)
        self.losses = 0

    async def start(self) -> None:
        """Connects, or warns."""
        await self._connection.start()

    async def close(self) -> None:
        """Disconnects."""
        await self._connection.close()

    async def raise_epoch(self, pool_id: str, floor: int) -> int:
        """See `Store.raise_epoch`."""
        return int(await self._run(_RAISE_EPOCH, [f"{_PREFIX}:epoch:{pool_id}"], [floor]))

    async def keep_epoch(self, pool_id: str, epoch: int) -> None:
        """See `Store.keep_epoch`."""
        await self._run(_KEEP_EPOCH, [f"{_PREFIX}:epoch:{pool_id}"], [epoch])

    async def announce(self, record: ServiceRecord, ttl: float, *, takeover: bool = False) -> bool:
        """See `Store.announce`."""
        milliseconds = max(1, int(ttl * 1000))
        arguments: list[Argument] = [
            record.nonce,
            record.address,
            record.space,
            milliseconds,
            record.name,
            int(takeover),
        ]
        return bool(await self._run(_ANNOUNCE, _service_keys(record), arguments))

    async def withdraw(self, record: ServiceRecord) -> bool:
        """See `Store.withdraw`."""
        return bool(await self._run(_WITHDRAW, _service_keys(record), [record.nonce, record.name]))

    async def services(self, kind: str) -> list[ServiceRecord]:
        """See `Store.services`."""
        found = await self._run(_SERVICES, [f"{_PREFIX}:services:{kind}", f"{_PREFIX}:service:{kind}:"], [])
        records = [
            ServiceRecord(kind, name.decode(), int(nonce), address.decode(), space.decode())
            for name, nonce, address, space in found
        ]
        return sorted(records, key=lambda record: record.name)

    async def _run(self, script: Script, keys: list[str], arguments: list[Argument]) -> Any:
        """Runs a script of the directory, again if the directory has begun another life."""
        for _ in range(_ATTEMPTS):
            known, fresh = self._life, secrets.token_hex(8)
            answer = await self._connection.run(script, [f"{_PREFIX}:life", *keys], [known, fresh, *arguments])
            if not isinstance(answer, list) or not answer or answer[0] != b"OTHER_LIFE":
                return answer
            self._begin_life(known, answer[1].decode())
        raise StoreUnavailableError("the store loses its contents again and again")

    def _begin_life(self, before: str, life: str) -> None:
        """Notes that the directory is not the one known."""
        if self._life not in {before, life}:
            # A later call has noticed it already.
            return
        if before and self._life != life:
            self.losses += 1
            log.warning("store_contents_lost", effect="everything that is ours is written again")
        self._life = life


def _service_keys(record: ServiceRecord) -> list[str]:
    return [f"{_PREFIX}:service:{record.kind}:{record.name}", f"{_PREFIX}:services:{record.kind}"]
