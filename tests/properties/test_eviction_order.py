"""The order of eviction against a slow, obvious model: a list of blocks that is sorted anew at every question.

The model knows nothing of lanes: each cached block has a tenant, a time of release, a priority and a time to live.
"""

from __future__ import annotations

import dataclasses
import math

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
import numpy as np
import pytest

from memsvc.core import retention
from memsvc.core.tenancy import LAST_RESORT, NOBODY, Tenancy, TenantQuota

BLOCKS = 40
TENANTS = (11, 22, 33)
RETAINED_DEFAULT = 9


@dataclasses.dataclass
class ModelBlock:
    """A block that is held or cached."""

    tag: int
    released: float = 0.0
    entered: int = 0
    cached: bool = False
    priority: int = 0
    ttl: int = 0
    pinned: bool = False

    def expired(self, now: float) -> bool:
        """Whether it is not worth more than any other any more."""
        return not self.priority or (self.cached and now >= self.released + self.ttl)

    def worth(self, now: float) -> float:
        """What it is worth now, as the documents say."""
        return self.priority * 0.5 ** ((now - self.released) / retention.HALF_LIFE)


class EvictionMachine(RuleBasedStateMachine):
    """Random lives of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.since = np.zeros(BLOCKS + 1)
        self.tenancy = Tenancy(BLOCKS + 1, self.since, RETAINED_DEFAULT)
        self.model: dict[int, ModelBlock] = {}
        self.quotas = dict.fromkeys(TENANTS, TenantQuota())
        self.now = 1000.0
        self.entries = 0

    def held(self, tag: int | None = None) -> list[int]:
        """Returns the blocks in tables."""
        return [block for block, one in self.model.items() if not one.cached and tag in {None, one.tag}]

    def cached(self, tag: int | None = None) -> list[int]:
        """Returns the blocks in none."""
        return [block for block, one in self.model.items() if one.cached and tag in {None, one.tag}]

    def retained(self, tag: int) -> int:
        """Returns how many blocks count against a quota."""
        return sum(one.tag == tag and one.priority > 0 for one in self.model.values())

    def sweep(self) -> None:
        """Lets go of what has expired, as every command begins by doing."""
        self.tenancy.expire(self.now)
        for one in self.model.values():
            if one.cached and one.expired(self.now):
                one.priority = one.ttl = 0

    @rule(seconds=st.sampled_from([0.0, 1.0, 3.0, 30.0, 700.0]))
    def wait(self, seconds: float) -> None:
        """Lets time pass."""
        self.now += seconds

    @rule(tag=st.sampled_from(TENANTS), count=st.integers(1, 6))
    def enter(self, tag: int, count: int) -> None:
        """Gives blank blocks to a table."""
        blank = [block for block in range(1, BLOCKS + 1) if block not in self.model][:count]
        self.tenancy.entered(np.array(blank, np.int64), self.tenancy.number(tag))
        for block in blank:
            self.model[block] = ModelBlock(tag)

    @rule(tag=st.sampled_from(TENANTS), data=st.data(), priority=st.sampled_from([0, 0, 10, 50, 100]),
          ttl=st.sampled_from([1, 4, 64, 1024]))  # fmt: skip
    def release(self, tag: int, data: st.DataObject, priority: int, ttl: int) -> None:
        """Closes a table: its blocks are retained as far as the quota goes, and cached or blank."""
        held = self.held(tag)
        if not held:
            return
        blocks = data.draw(st.lists(st.sampled_from(held), min_size=1, unique=True))
        kept = data.draw(st.integers(0, len(blocks)))
        self.sweep()
        number = self.tenancy.number(tag)
        if priority:
            limit = self.quotas[tag].retained
            room = (RETAINED_DEFAULT if limit is None else limit) - self.retained(tag)
            self.tenancy.retain(np.array(blocks[:kept], np.int64), retention.retention_class(priority, ttl), number)
            for block in blocks[:kept]:
                one = self.model[block]
                if one.priority:
                    one.priority, one.ttl = max((one.priority, one.ttl), (priority, ttl))
                elif room > 0 and not one.pinned:
                    room -= 1
                    one.priority, one.ttl = priority, ttl
        # The tail before the head.
        cached = np.array(blocks[:kept][::-1], np.int64)
        self.since[cached] = self.now
        if kept < len(blocks):
            self.tenancy.blanked(np.array(blocks[kept:]))
        if kept:
            self.tenancy.put(cached)
        for block in blocks[kept:]:
            del self.model[block]
        for block in cached.tolist():
            self.entries += 1
            one = self.model[block]
            one.cached, one.released, one.entered = True, self.now, self.entries

    @precondition(lambda self: self.cached())
    @rule(data=st.data())
    def revive(self, data: st.DataObject) -> None:
        """Finds cached blocks again."""
        blocks = data.draw(st.lists(st.sampled_from(self.cached()), min_size=1, unique=True))
        self.sweep()
        self.tenancy.remove(np.array(blocks))
        for block in blocks:
            self.model[block].cached = False

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        """Ends the retention of blocks, or their pinning."""
        blocks = data.draw(st.lists(st.sampled_from(sorted(self.model)), min_size=1, unique=True))
        self.sweep()
        self.tenancy.let_go(np.array(blocks))
        for block in blocks:
            one = self.model[block]
            if one.cached and (one.priority or one.pinned):
                self.entries += 1
                one.entered = self.entries
            one.priority, one.ttl, one.pinned = 0, 0, False

    @precondition(lambda self: self.model)
    @rule(data=st.data(), tag=st.sampled_from(TENANTS))
    def pin(self, data: st.DataObject, tag: int) -> None:
        """Pins blocks of a tenant."""
        mine = [block for block, one in self.model.items() if one.tag == tag and not one.pinned]
        if not mine:
            return
        blocks = data.draw(st.lists(st.sampled_from(mine), min_size=1, max_size=3, unique=True))
        self.sweep()
        self.tenancy.pin(np.array(blocks), self.tenancy.number(tag))
        for block in blocks:
            one = self.model[block]
            one.priority, one.ttl, one.pinned = 0, 0, True
            if one.cached:
                self.entries += 1
                one.entered = self.entries

    @rule(tag=st.sampled_from(TENANTS), floor=st.sampled_from([0, 0, 3, 8]), retained=st.sampled_from([None, 2, 20]))
    def set_quota(self, tag: int, floor: int, retained: int | None) -> None:
        """Changes a tenant's quota."""
        self.quotas[tag] = TenantQuota(floor=floor, retained=retained)
        self.tenancy.set_quota(tag, self.quotas[tag])

    def order(self, taker: int) -> tuple[list[int], int]:
        """Returns in which order cached blocks are taken for a tenant, and how many of them may be."""
        blocks = [(block, self.model[block]) for block in self.cached()]
        blocks.sort(key=lambda item: item[1].entered)
        plain = [block for block, one in blocks if not one.pinned and one.expired(self.now)]
        kept = [(one.worth(self.now), place, block) for place, (block, one) in enumerate(blocks)
                if not one.pinned and not one.expired(self.now)]  # fmt: skip
        # Of equal worth, the one released first.
        kept.sort(key=lambda item: (round(math.log2(item[0]), 9), item[1]))
        order = plain + [block for _, _, block in kept]
        excess = {tag: len(self.held(tag)) + len(self.cached(tag)) - quota.floor for tag, quota in self.quotas.items()}
        may, sheltered = [], []
        for block in order:
            tag = self.model[block].tag
            free = not self.quotas[tag].floor or tag == taker or excess[tag] > 0
            (may if free else sheltered).append(block)
            excess[tag] -= 1
        if taker == LAST_RESORT:
            rest = sheltered + [block for block, one in blocks if one.pinned]
            return may + rest, len(may) + len(rest)
        return may, len(may)

    @rule(taker=st.sampled_from([NOBODY, LAST_RESORT, *TENANTS]), data=st.data())
    def take(self, taker: int, data: st.DataObject) -> None:
        """Evicts blocks for somebody."""
        number = self.tenancy.number(taker) if taker in TENANTS else taker
        self.sweep()
        order, allowed = self.order(taker)
        assert len(self.cached()) - self.tenancy.sheltered(number) == allowed
        count = data.draw(st.integers(0, allowed))
        if not count:
            return
        assert self.tenancy.take(count, number, self.now).tolist() == order[:count]
        for block in order[:count]:
            del self.model[block]

    @invariant()
    def counts_agree(self) -> None:
        """What is counted is what there is."""
        for tag in TENANTS:
            use = self.tenancy.use(tag)
            assert (use.held, use.cached) == (len(self.held(tag)), len(self.cached(tag)))
            assert use.retained == self.retained(tag)
            assert use.pinned == sum(one.tag == tag and one.pinned for one in self.model.values())
        assert set(self.tenancy.blocks().tolist()) == set(self.cached())


EvictionMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.invariant(2)
class TestEvictionMachine(EvictionMachine.TestCase):  # type: ignore[misc,name-defined]
    """Runs the machine: a failure here is a retained prompt lost to a stranger, or a block that nobody can take."""
