"""A connection to Redis, Valkey or a Cluster of them that fails fast and says so once.

Every change is one Lua script, called by EVALSHA and loaded again when the server has forgotten it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
import dataclasses
import hashlib
import time
from typing import Any, TypeVar
from urllib.parse import urlsplit

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError
import structlog

from memsvc.store.credentials import Credentials
from quire.errors import StoreUnavailableError

log = structlog.get_logger(__name__)

Result = TypeVar("Result")
Argument = str | int | bytes

TIMEOUT_SECONDS = 1.0
# After a failure the server is left alone for so long: callers fail at once instead of waiting for the timeout each.
_PAUSE_SECONDS = 0.5
_CONNECTIONS = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Script:
    """A Lua script and its SHA-1, by which the server knows it."""

    source: str

    @property
    def digest(self) -> str:
        """Returns the SHA-1 in hexadecimal."""
        return hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()


def _open(url: str, credentials: Credentials, timeout: float) -> Any:
    """Returns a client of the library, not connected.

    Raises:
        ConfigError, ValueError: the address or the credentials cannot be.
    """
    scheme = urlsplit(url).scheme
    plain = scheme.removesuffix("+cluster")
    options: dict[str, Any] = {
        **credentials.options(tls=plain == "rediss"),
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        # Failing is the caller's business; a retry inside would only double the wait.
        "retry": Retry(NoBackoff(), 0),
    }
    address = plain + url[len(scheme) :]
    if scheme != plain:
        # A node that moved is followed; the deadline of the call bounds all of it.
        options["retry"] = Retry(NoBackoff(), 2)
        return redis.asyncio.RedisCluster.from_url(address, max_connections=_CONNECTIONS, **options)
    pool = redis.asyncio.BlockingConnectionPool.from_url(
        address, max_connections=_CONNECTIONS, timeout=timeout, **options
    )
    return redis.asyncio.Redis.from_pool(pool)


class RedisConnection:
    """Runs scripts on a server.

    Args:
        url: redis://, rediss://, redis+cluster:// or rediss+cluster://, then [user:password@]host:port[/db].
        credentials: instead of those in the URL.
        timeout: seconds that the server has to connect, or to answer.

    Raises:
        ConfigError, ValueError: the address or the credentials cannot be.
    """

    def __init__(self, url: str, credentials: Credentials, timeout: float) -> None:
        self._client = _open(url, credentials, timeout)
        self._deadline = 2 * timeout
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

    async def run(self, script: Script, keys: Sequence[str], arguments: Sequence[Argument]) -> Any:
        """Runs a script and returns its answer; raises StoreUnavailableError."""

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
            async with asyncio.timeout(self._deadline):
                result = await call()
        except (RedisError, OSError, TimeoutError) as error:
            self._retry_at = time.monotonic() + _PAUSE_SECONDS
            reason = str(error) or type(error).__name__
            if self._available:
                self._available = False
                log.warning("store_unavailable", error=reason, effect="no shared metadata until it is back")
            raise StoreUnavailableError(f"the store does not answer: {reason}") from error
        if not self._available:
            self._available = True
            log.info("store_recovered")
        return result
