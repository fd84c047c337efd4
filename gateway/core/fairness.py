"""Fair shares: whoever has been served least goes first.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): each tenant has a
counter of the tokens that it was given, prompt tokens that were computed counted once and generated ones twice; the
next request to be admitted is one of the tenant with the lowest counter. A tenant that comes back is lifted to the
lowest counter of those that wait, or else to that of the one served last, so that nobody saves up what it did not use.

Between two tenants that both have requests waiting, the counters differ by no more than what the running requests of
one can be given before one of them ends; so a request of the less served tenant waits for that at most, whatever
others send.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

PROMPT_WEIGHT: Final = 1
OUTPUT_WEIGHT: Final = 2
_TENANTS_KEPT: Final = 1024
"""Counters of tenants without a waiting request that are kept, beyond as many as have one."""


class FairShares:
    """The counters of all tenants of a queue."""

    __slots__ = ("_counters", "_floor", "_last")

    def __init__(self) -> None:
        """Starts with nobody served."""
        self._counters: dict[str, int] = {}
        # What a tenant that nobody knows has: as much as the least served one had when it was looked at last.
        self._floor = 0
        self._last = ""

    def counter(self, tenant: str) -> int:
        """Returns what a tenant was given, in weighted tokens."""
        return self._counters.get(tenant, self._floor)

    def arrived(self, tenant: str, waiting: Collection[str]) -> None:
        """A request of a tenant comes; `waiting` are the tenants that have one waiting already."""
        # Where nobody waits, whoever left last has gone on meanwhile.
        self._floor = max(self._floor, min(map(self.counter, waiting), default=self.counter(self._last)))
        if tenant not in waiting:
            self._counters[tenant] = max(self.counter(tenant), self._floor)
        if len(self._counters) > _TENANTS_KEPT + 2 * len(waiting):
            kept = {*waiting, tenant, self._last}
            floor = self._floor
            self._counters = {name: count for name, count in self._counters.items() if name in kept or count > floor}

    def left(self, tenant: str) -> None:
        """A request of a tenant is admitted."""
        self._last = tenant

    def charge(self, tenant: str, tokens: int) -> None:
        """A tenant was given so many weighted tokens."""
        self._counters[tenant] = self.counter(tenant) + tokens

    def order(self, tenants: Collection[str]) -> list[str]:
        """Returns tenants, the least served first."""
        return sorted(tenants, key=lambda tenant: (self.counter(tenant), tenant))
