"""The check of the invariants finds every kind of damage: one that finds nothing proves nothing."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses

import numpy as np
import pytest

from memsvc.core import invariants
from memsvc.core.memory import MemoryCore
from memsvc.core.pool_memory import PoolMemory
from memsvc.core.validation import PoolRegistration
from memsvc.local import packed
from quire.columns import pack
from quire.errors import InvariantError
from quire.memory import AdmitRequest, CloseReason, JournalEntry, PoolSpec

POOL = "pool"


@dataclasses.dataclass
class Busy:
    """A pool in use, and the slots of two of its tables."""

    core: MemoryCore
    memory: PoolMemory
    first: int
    second: int


def busy() -> Busy:
    """Returns a core whose pool has running, cached, leased and free blocks, and two open tables, 1 block shared.

    Blocks 1 and 2 belong to table `first` (24 tokens, all written), 1 and 3 to table `second` (20 tokens, 17 written).
    """
    core = MemoryCore(b"secret of this test", lease_ttl=float("inf"))
    core.register_pool(PoolRegistration(POOL, 1, "h:1", PoolSpec(12, 16, 1, "m", "float32", 128)), 1, 0.0)
    gateway = core.connect_gateway("g", 1, 0.0)

    def admit(name: str, tokens: list[int]) -> int:
        return core.admit(gateway, AdmitRequest(POOL, 1, name, 0, pack(tokens)), 0.0).table

    def tell(**fields: list[int]) -> None:
        core.journal(gateway, POOL, 1, packed(JournalEntry(POOL, 1, **fields)), 0.0)  # type: ignore[arg-type]

    first = admit("first", list(range(24)))
    tell(tables=[first], token_starts=[24], token_counts=[0], written_counts=[24])
    second = admit("second", [*range(16), 90, 91, 92, 93])
    tell(tables=[second], token_starts=[20], token_counts=[0], written_counts=[17])
    third = admit("third", list(range(500, 520)))
    tell(tables=[third], token_starts=[20], token_counts=[0], written_counts=[20])
    tell(closed=[third], close_reasons=[CloseReason.FINISHED])
    core.lease(gateway, POOL, 1, 2, 0.0)
    memory = core.pool(POOL).memory
    return Busy(core, memory, memory.tables.slot(first), memory.tables.slot(second))


Damage = Callable[[Busy], object]


def set_at(column: np.ndarray, index: int, value: int) -> None:  # type: ignore[type-arg]
    """Writes one value of a column."""
    column[index] = value


def swap(it: Busy) -> None:
    """Makes the second table write to the block that the first one has open."""
    memory = it.memory
    record = memory.tables.record(it.second)
    memory.pool.refs[record.blocks[1]] -= 1
    memory.pool.state[record.blocks[1]] = 1
    memory.pool._counts[3] -= 1
    memory.pool._counts[1] += 1
    memory.pool._blank.put(np.array([record.blocks[1]]))
    record.blocks[1] = 2
    memory.pool.refs[2] += 1


def copy_identity(memory: PoolMemory) -> None:
    """Gives a cached block the identity of another one."""
    memory.prefix.identities[4] = memory.prefix.identities[1]


def unfill(memory: PoolMemory) -> None:
    """Takes tokens away from a published block that no table names."""
    memory.pool.filled[4] = 3


def lengthen(it: Busy) -> None:
    """Gives a table more blocks than its longest sequence could have."""
    memory = it.memory
    record = memory.tables.record(it.first)
    blocks, _ = memory.pool.take(5, 0.0)
    memory.prefix.forget(blocks)
    memory.pool.tenant[blocks] = record.tenant_tag
    record.blocks.extend(blocks.tolist() * 3)
    memory.pool.refs[blocks] = 3


DAMAGES: list[tuple[str, Damage]] = [
    ("references", lambda it: set_at(it.memory.pool.refs, 1, 1)),
    ("references", lambda it: set_at(it.memory.pool.closing_refs, 1, 1)),
    ("counted", lambda it: set_at(it.memory.pool.state, 3, 1)),
    ("counted", lambda it: set_at(it.memory.pool.state, 11, 2)),
    ("free order", lambda it: it.memory.pool._blank.put(np.array([11]))),
    ("may write", swap),
    ("identity", lambda it: copy_identity(it.memory)),
    ("not fully written", lambda it: unfill(it.memory)),
    ("cannot be matched", lambda it: it.memory.prefix.forget(np.array([4, 5]))),
    ("another tenant", lambda it: set_at(it.memory.pool.tenant, 2, 77)),
    ("at most", lengthen),
    ("out of order", lambda it: set_at(it.memory.tables.written, it.first, 25)),
    ("leased", lambda it: setattr(it.memory.grants[1], "leased", 1)),
    ("tables", lambda it: it.memory.grants[1].tables.clear()),
]


def test_a_busy_pool_is_sound() -> None:
    """Otherwise every damage below would be found for the wrong reason."""
    invariants.check(busy().core)


@pytest.mark.invariant(1, 2, 3, 4, 5, 6)
@pytest.mark.parametrize(("words", "damage"), DAMAGES, ids=[f"{n}-{words}" for n, (words, _) in enumerate(DAMAGES)])
def test_damage_is_found_and_named(words: str, damage: Damage) -> None:
    """A memory service that goes on with a broken pool serves one user's text to another."""
    it = busy()
    damage(it)
    with pytest.raises(InvariantError, match=words):
        invariants.check(it.core)


@pytest.mark.invariant(7)
def test_tables_of_another_epoch_are_found() -> None:
    """A table that outlives its executor names blocks of a device that is gone."""
    it = busy()
    it.memory.epoch += 1
    with pytest.raises(InvariantError, match="epoch"):
        invariants.check(it.core)
