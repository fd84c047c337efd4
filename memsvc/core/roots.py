"""Root digests, to which sequences are chained: the only values of the core that a secret is needed for."""

from __future__ import annotations

from typing import Protocol

from quire.errors import CorruptionError
from quire.memory import PoolSpec


class Roots(Protocol):
    """Hears of root digests, the only values that are derived from the tenants' secret."""

    def find(self, spec: PoolSpec, adapter: str, tenant: str, cache_salt: str) -> tuple[bytes, int] | None:
        """Returns a root and the tag of its tenant where the secret is not known; else None."""
        ...

    def derived(self, spec: PoolSpec, adapter: str, tenant: str, cache_salt: str, root: bytes, tenant_tag: int) -> None:
        """Hears of a root that was derived."""
        ...


class RecordedRoots:
    """Root digests as a log took them down: a replay elsewhere does without the tenants' secret."""

    def __init__(self) -> None:
        self._known: dict[tuple[PoolSpec, str, str, str], tuple[bytes, int]] = {}

    def copy(self) -> RecordedRoots:
        """Returns the same knowledge, to be added to apart."""
        copied = RecordedRoots()
        copied._known = dict(self._known)
        return copied

    def note(self, spec: PoolSpec, adapter: str, tenant: str, cache_salt: str, root: bytes, tenant_tag: int) -> None:
        """Takes in what one entry says."""
        self._known[spec, adapter, tenant, cache_salt] = (root, tenant_tag)

    def find(self, spec: PoolSpec, adapter: str, tenant: str, cache_salt: str) -> tuple[bytes, int]:
        """Returns a root; raises CorruptionError if the log does not have it."""
        known = self._known.get((spec, adapter, tenant, cache_salt))
        if known is None:
            raise CorruptionError(f"the log has no root for tenant {tenant[:64]!r} and adapter {adapter[:64]!r}")
        return known

    def derived(self, spec: PoolSpec, adapter: str, tenant: str, cache_salt: str, root: bytes, tenant_tag: int) -> None:
        """Is never called: `find` answers or raises."""
        self.note(spec, adapter, tenant, cache_salt, root, tenant_tag)
