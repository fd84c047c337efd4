"""Shared metadata behind one protocol: embedded, or on Redis."""

from memsvc.store.base import (
    HintMatch,
    HintOwner,
    HintSpace,
    HintTicket,
    JournalPosition,
    JournalRead,
    ServiceRecord,
    Store,
    StoreFencedError,
)
from memsvc.store.credentials import Credentials
from memsvc.store.memory import MemoryStore
from quire.errors import ConfigError

__all__ = [
    "HintMatch",
    "HintOwner",
    "HintSpace",
    "HintTicket",
    "JournalPosition",
    "JournalRead",
    "ServiceRecord",
    "Store",
    "StoreFencedError",
    "open_store",
]

_EXPECTED = "memory:// or redis[s][+cluster]://[USER:PASS@]HOST:PORT[/DB]"


def open_store(url: str, credentials: Credentials | None = None) -> Store:
    """Returns the store at `url`, not yet started.

    Args:
        url: memory://, or the address of a server.
        credentials: instead of those in the URL.

    Raises:
        ConfigError: no such kind of store, or the address or the credentials cannot be.
    """
    if url == "memory://":
        return MemoryStore()
    scheme = url.partition("://")[0]
    if scheme in {"redis", "rediss", "redis+cluster", "rediss+cluster"}:
        from memsvc.store.redis import RedisStore  # noqa: PLC0415 - the embedded store needs no client library

        try:
            return RedisStore(url, credentials)
        except ValueError:
            # What the library says may quote a password.
            message = f"--store: the address cannot be read; expected {_EXPECTED}"
            raise ConfigError(message, field="store") from None
    message = f"--store: expected {_EXPECTED}, found scheme {scheme[:32]!r}"
    raise ConfigError(message, field="store")
