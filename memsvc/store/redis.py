"""The shared store on Redis or Valkey.

Every change is one Lua script, called by EVALSHA and loaded again when the server has forgotten it. All keys carry the
hash tag {memsvc}, so that they lie together in a cluster.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
import dataclasses
import hashlib
import time
from typing import Any, TypeVar

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError
import structlog

from memsvc.store.base import ServiceRecord
from quire.errors import StoreUnavailableError

log = structlog.get_logger(__name__)

Result = TypeVar("Result")

_PREFIX = "quire:{memsvc}"
_TIMEOUT_SECONDS = 1.0
# After a failure the server is left alone for so long: callers fail at once instead of waiting for the timeout each.
_PAUSE_SECONDS = 0.5


@dataclasses.dataclass(frozen=True, slots=True)
class _Script:
    """A Lua script and its SHA-1, by which the server knows it."""

    source: str

    @property
    def digest(self) -> str:
        return hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()


_RAISE_EPOCH = _Script("""
local stored = tonumber(redis.call('GET', KEYS[1]) or '0')
local epoch = math.max(stored, tonumber(ARGV[1])) + 1
redis.call('SET', KEYS[1], string.format('%d', epoch))
return epoch
""")
_KEEP_EPOCH = _Script("""
local stored = tonumber(redis.call('GET', KEYS[1]) or '0')
if tonumber(ARGV[1]) > stored then redis.call('SET', KEYS[1], ARGV[1]) end
return 1
""")
_ANNOUNCE = _Script("""
local nonce = redis.call('HGET', KEYS[1], 'nonce')
if nonce and nonce ~= ARGV[1] and ARGV[5] == '0' then return 0 end
redis.call('HSET', KEYS[1], 'nonce', ARGV[1], 'address', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('SADD', KEYS[2], ARGV[4])
return 1
""")
_WITHDRAW = _Script("""
if redis.call('HGET', KEYS[1], 'nonce') ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
redis.call('SREM', KEYS[2], ARGV[2])
return 1
""")
_SERVICES = _Script("""
local found = {}
for _, name in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local held = redis.call('HMGET', KEYS[2] .. name, 'nonce', 'address')
  if held[1] then
    found[#found + 1] = {name, held[1], held[2]}
  else
    redis.call('SREM', KEYS[1], name)
  end
end
return found
""")


class RedisStore:
    """Implements `Store` on a server.

    Args:
        url: redis://[user:password@]host:port/db
        timeout: seconds that the server has to connect or to answer.
    """

    def __init__(self, url: str, *, timeout: float = _TIMEOUT_SECONDS) -> None:
        self._client: redis.asyncio.Redis = redis.asyncio.Redis.from_url(
            url,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            # Failing is the caller's business; a retry inside would only double the wait.
            retry=Retry(NoBackoff(), 0),
            max_connections=4,
        )
        self._available = True
        self._retry_at = 0.0

    async def start(self) -> None:
        """Connects, or warns."""
        try:
            await self._guarded(self._client.ping)
        except StoreUnavailableError:
            return
        log.info("store_connected")

    async def close(self) -> None:
        """Disconnects."""
        await self._client.aclose()

    async def raise_epoch(self, pool_id: str, floor: int) -> int:
        """See `Store.raise_epoch`."""
        return int(await self._run(_RAISE_EPOCH, [f"{_PREFIX}:epoch:{pool_id}"], [floor]))

    async def keep_epoch(self, pool_id: str, epoch: int) -> None:
        """See `Store.keep_epoch`."""
        await self._run(_KEEP_EPOCH, [f"{_PREFIX}:epoch:{pool_id}"], [epoch])

    async def announce(self, record: ServiceRecord, ttl: float, *, takeover: bool = False) -> bool:
        """See `Store.announce`."""
        arguments: list[str | int] = [record.nonce, record.address, max(1, int(ttl * 1000)), record.name, int(takeover)]
        return bool(await self._run(_ANNOUNCE, _service_keys(record), arguments))

    async def withdraw(self, record: ServiceRecord) -> bool:
        """See `Store.withdraw`."""
        return bool(await self._run(_WITHDRAW, _service_keys(record), [record.nonce, record.name]))

    async def services(self, kind: str) -> list[ServiceRecord]:
        """See `Store.services`."""
        keys = [f"{_PREFIX}:services:{kind}", f"{_PREFIX}:service:{kind}:"]
        found = await self._run(_SERVICES, keys, [])
        records = [ServiceRecord(kind, name.decode(), int(nonce), address.decode()) for name, nonce, address in found]
        return sorted(records, key=lambda record: record.name)

    async def _run(self, script: _Script, keys: list[str], arguments: list[str | int]) -> Any:
        """Runs a script."""

        async def call() -> Any:
            try:
                return await self._client.evalsha(script.digest, len(keys), *keys, *arguments)
            except NoScriptError:
                return await self._client.eval(script.source, len(keys), *keys, *arguments)

        return await self._guarded(call)

    async def _guarded(self, call: Callable[[], Awaitable[Result]]) -> Result:
        """Returns what `call` returns; warns once when the server stops answering, and once when it is back.

        Raises:
            StoreUnavailableError: it does not answer.
        """
        now = time.monotonic()
        if not self._available and now < self._retry_at:
            raise StoreUnavailableError("the store did not answer a moment ago")
        try:
            result = await call()
        except (RedisError, OSError, TimeoutError) as error:
            self._retry_at = time.monotonic() + _PAUSE_SECONDS
            if self._available:
                self._available = False
                log.warning("store_unavailable", error=str(error), effect="no shared metadata until it is back")
            raise StoreUnavailableError(f"the store does not answer: {error}") from error
        if not self._available:
            self._available = True
            log.info("store_recovered")
        return result


def _service_keys(record: ServiceRecord) -> list[str]:
    return [f"{_PREFIX}:service:{record.kind}:{record.name}", f"{_PREFIX}:services:{record.kind}"]
