"""Shared metadata behind one protocol: embedded, or on Redis."""

from memsvc.store.base import ServiceRecord, Store
from memsvc.store.memory import MemoryStore
from quire.errors import ConfigError

__all__ = ["ServiceRecord", "Store", "open_store"]


def open_store(url: str) -> Store:
    """Returns the store at `url`, not yet started.

    Raises:
        ConfigError: no such kind of store, or the address cannot be read.
    """
    if url == "memory://":
        return MemoryStore()
    if url.startswith(("redis://", "rediss://")):
        from memsvc.store.redis import RedisStore  # noqa: PLC0415 - the embedded store needs no client library

        try:
            return RedisStore(url)
        except ValueError as error:
            message = f"--store: {error}; expected redis://HOST:PORT/DB"
            raise ConfigError(message, field="store") from error
    scheme = url.partition(":")[0]
    message = f"--store: expected memory:// or redis://HOST:PORT/DB, found scheme {scheme!r}"
    raise ConfigError(message, field="store")
