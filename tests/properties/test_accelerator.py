"""The accelerator does exactly what Python does, and declines, or refuses, whatever else it is handed."""

from __future__ import annotations

from collections.abc import Callable
import hashlib
import random
from typing import Any

import numpy as np
import pytest

from memsvc.core.admission import AdmitContext
from memsvc.core.pool_memory import PoolMemory
from quire import hashing, native
from quire.columns import pack
from quire.memory import AdmitRequest, PoolSpec
from tests.properties.native_pair import Pair, computed_by

ACCELERATOR = native.accelerator
pytestmark = pytest.mark.skipif(ACCELERATOR is None, reason=f"no accelerator: {native.reason}")
COMMANDS = 150


@pytest.mark.parametrize("seed", range(12))
def test_both_cores_say_and_remember_the_same(seed: int) -> None:
    """Otherwise what a pool holds would depend on whether a compiler was there when Quire was installed."""
    assert ACCELERATOR is not None
    pair = Pair(seed, ACCELERATOR)
    for _ in range(COMMANDS):
        pair.step()


class Grown:
    """A pool of eight blocks in which table 1 of gateway 1 holds a block of 4 known tokens, and block 2 is leased."""

    def __init__(self, accelerator: native.Accelerator) -> None:
        self.memory = PoolMemory(PoolSpec(8, 16, 1, "model", "float32", 128), 1)
        context = AdmitContext(1, bytes(16), 0, 0)
        self.memory.admit(AdmitRequest("pool", 1, "r", 0, pack([1, 2, 3, 4])), context, 1.0)
        self.memory.lease(1, 1, 1.0)
        self.held = self.memory.tables.hold(accelerator)

    def apply(self, rows: list[int], token_ids: list[int], appended: list[int]) -> object:
        """Applies one row (table, start, count, written); returns what the accelerator does."""
        columns = [np.array([value], np.int64) for value in rows]
        more = [np.array(token_ids, np.int64), np.array(appended, np.int64).reshape(-1, 3)]
        return self.held.apply(self.memory.pool.native, self.memory.prefix.native, 1, 1.0, 144, 9, *columns, *more)


def test_the_usual_journal_is_not_declined() -> None:
    """An accelerator that declines everything gives the right results, at the speed of Python."""
    assert ACCELERATOR is not None
    fresh = Grown(ACCELERATOR).apply([1, 4, 20, 20], list(range(20)), [1, 1, 2])
    assert isinstance(fresh, tuple)
    assert [fresh[0], fresh[1], fresh[4], fresh[5]] == [1, [1], [0], [0]]


def test_tables_that_are_kept_by_hand_are_declined() -> None:
    """A table whose journals mean more would lose that with an accelerator."""
    assert ACCELERATOR is not None
    grown = Grown(ACCELERATOR)
    grown.memory.tables.by_hand[grown.memory.tables.slot(1)] = 1
    assert grown.apply([1, 4, 1, 4], [9], []) is None
    assert grown.apply([1, 4, 0, 4], [], [1, 1, 2]) is None


@pytest.mark.parametrize("parent_length", [0, 1, 16, 112, 127, 128, 129, 400])
def test_digests_are_those_of_the_standard_library(parent_length: int) -> None:
    """Blocks are shared among processes under these names, with and without an accelerator."""
    assert ACCELERATOR is not None
    chance = random.Random(parent_length)
    parent = chance.randbytes(parent_length)
    for length in (1, 15, 64, 111, 112, 113, 128, 240, 241, 1000):
        data = chance.randbytes(length)
        expected = hashlib.blake2b(parent + data, digest_size=16).digest()
        assert ACCELERATOR.each([parent], data, length) == ACCELERATOR.chain(parent, data, length) == [expected]


def test_chains_are_those_of_python() -> None:
    """As above, for chains, whose last block may be cut off."""
    data = random.Random(0).randbytes(4 * 16 * 9 + 7)
    for stride in (16, 32, 64):
        found = []
        for accelerator in (ACCELERATOR, None):
            with computed_by(accelerator):
                parents = [bytes([row]) * 16 for row in range(-(-len(data) // (4 * stride)))]
                found.append((hashing.chain(bytes(16), data, stride), hashing.each(parents, data, 4 * stride)))
        assert found[0] == found[1]


@pytest.mark.parametrize("accelerator", [ACCELERATOR, None], ids=["native", "python"])
def test_as_many_parents_as_blocks_are_needed(accelerator: native.Accelerator | None) -> None:
    """A missing parent would name every block behind it wrongly."""
    with computed_by(accelerator), pytest.raises(ValueError):  # noqa: PT011 - the two word it differently
        hashing.each([bytes(16)], bytes(128), 64)


def columns(*items: tuple[Any, int]) -> list[np.ndarray[Any, Any]]:
    """Returns columns of zeros."""
    return [np.zeros(length, dtype) for dtype, length in items]


BLOCKS = [(np.int32, 8), (np.uint32, 8), (np.uint8, 8), (np.uint8, 8), (np.int32, 8), (np.uint32, 8), (np.float64, 8)]
INDEX = [
    *((np.uint32, 128), (np.uint8, 8), (np.uint64, 16), (np.uint64, 16), (np.uint8, 8), (np.bool_, 8), (np.int32, 8)),
    *((np.int32, 8), (np.int32, 16), (np.int32, 8), (np.int32, 16), (np.int32, 8)),
]
TABLES = [(np.int64, 4)] * 11


@pytest.mark.parametrize(
    ("make", "first", "items"),
    [("Blocks", (8,), BLOCKS), ("Index", (8, 16, 16), INDEX), ("Tables", (4, [None] * 4), TABLES)],
)
def test_columns_that_do_not_fit_are_refused(make: str, first: tuple[Any, ...], items: list[tuple[Any, int]]) -> None:
    """Memory behind the end of a column belongs to somebody else."""
    constructor = getattr(ACCELERATOR, make)
    assert constructor(*first, *columns(*items)) is not None
    for at, (dtype, length) in enumerate(items):
        for wrong in ((dtype, length - 1), (dtype, length + 1), (np.complex128, length)):
            with pytest.raises(ValueError, match="found"):
                constructor(*first, *columns(*items[:at], wrong, *items[at + 1 :]))
        read_only = columns(*items)
        read_only[at].flags.writeable = False
        with pytest.raises((ValueError, BufferError)):
            constructor(*first, *read_only)


def test_garbage_is_refused_and_breaks_nothing() -> None:
    """An extension that trusts its caller takes the whole service down."""
    assert ACCELERATOR is not None
    chance = random.Random(3)
    pair = Pair(3, ACCELERATOR)
    for _ in range(40):
        pair.step()
    memory = pair.cores[0][0].pools["pool"].memory
    values: list[Callable[[], Any]] = [
        lambda: None,
        lambda: chance.choice([-1, 0, 1, 2**31, 2**63 - 1, 2**70, 0.5, "x", b"abc", b"abcd", float("nan")]),
        lambda: [chance.choice([0, 1, 7, -5, 2**40, 2**80, None, b"", bytes(16)]) for _ in range(chance.randint(0, 3))],
        lambda: np.array([chance.choice([0, 1, 70, -1, 2**62]) for _ in range(chance.randint(0, 6))], np.int64),
        lambda: np.zeros((2, 3), np.int64)[:, ::2],
        lambda: np.zeros(3, np.float32),
        lambda: memoryview(bytes(64))[::3],
        lambda: bytes(64),
        lambda: memory.pool.native,
        lambda: memory.prefix.native,
    ]
    held = memory.tables.hold(ACCELERATOR)
    calls = [
        *((memory.pool.native.take, 3), (memory.pool.native.drop, 3)),  # type: ignore[union-attr]
        *((memory.prefix.native.publish, 5), (memory.prefix.native.follow, 5)),  # type: ignore[union-attr]
        *((memory.prefix.native.chain, 2), (held.apply, 12)),  # type: ignore[union-attr]
        *((ACCELERATOR.chain, 3), (ACCELERATOR.each, 3)),
        *((ACCELERATOR.Blocks, 8), (ACCELERATOR.Index, 15), (ACCELERATOR.Tables, 13)),
    ]
    refusal_count = 0
    for _ in range(4000):
        call, count = chance.choice(calls)
        try:
            call(*[chance.choice(values)() for _ in range(count + chance.choice([0, 0, 0, 0, 1, -1]))])
        except (TypeError, ValueError, IndexError, OverflowError, LookupError, BufferError):
            refusal_count += 1
    assert refusal_count > 1000
