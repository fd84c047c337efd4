"""The tail: what a pool caches is in the store exactly, or the store is known to be behind; nobody waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
import hashlib
import itertools
import random
from typing import Any

import numpy as np
import pytest
import structlog

from memsvc.core.events import BlocksRemoved, BlocksStored, CacheCleared, CacheEvent
from memsvc.sharing import publisher as publishing
from memsvc.sharing import records
from memsvc.sharing.publisher import Publisher
from memsvc.sharing.replica import Replica
from memsvc.sharing.sinks import HintSink, JournalSink
from memsvc.store import HintOwner, HintSpace, Store
from quire.errors import CorruptionError, StoreUnavailableError
from tests.store.conftest import Kind

SPACE = HintSpace("model", 16, "float32")
OWNER = HintOwner("p", 7, "h:1", "m", 9, "h:2")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a publisher try again at once."""
    monkeypatch.setattr(publishing, "_BACKOFF_MINIMUM_SECONDS", 0.002)
    monkeypatch.setattr(publishing, "_BACKOFF_MAXIMUM_SECONDS", 0.01)


def identity(number: int) -> bytes:
    """Returns an identity."""
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=16).digest()


def stored(rows: Sequence[tuple[int, bytes, int]]) -> BlocksStored:
    """Returns the event of (block, identity, index) rows."""
    count = len(rows)
    return BlocksStored(
        blocks=np.array([row[0] for row in rows], np.int64),
        indexes=np.array([row[2] for row in rows], np.int64),
        identities=b"".join(row[1] for row in rows),
        parents=bytes(16 * count),
        tenant_tags=np.zeros(count, np.uint32),
        token_ids=b"",
        block_size=16,
    )


def removed(rows: Sequence[tuple[int, bytes, int]]) -> BlocksRemoved:
    """Returns the event of (block, identity, index) rows."""
    event = stored(rows)
    return BlocksRemoved(event.blocks, event.indexes, event.identities)


class Pool:
    """A pool that publishes and forgets at random."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.blocks: dict[int, tuple[bytes, int]] = {}
        self._numbers = itertools.count()

    def rows(self) -> list[tuple[int, bytes, int]]:
        """Returns everything published."""
        return [(block, *content) for block, content in sorted(self.blocks.items())]

    def published(self) -> BlocksStored:
        """Returns everything published, as an event."""
        return stored(self.rows())

    def change(self) -> CacheEvent:
        """Changes something and returns the event of it."""
        draw = self.random.random()
        if draw < 0.03:
            self.blocks.clear()
            return CacheCleared()
        if draw < 0.4 and self.blocks:
            gone = self.random.sample(sorted(self.blocks), self.random.randint(1, len(self.blocks)))
            return removed([(block, *self.blocks.pop(block)) for block in gone])
        free = [block for block in range(1, 3000) if block not in self.blocks]
        first = self.random.randint(0, 40)
        chosen = self.random.sample(free, self.random.randint(1, 90))
        rows = [(block, identity(next(self._numbers)), first + row) for row, block in enumerate(chosen)]
        self.blocks.update({block: (digest, index) for block, digest, index in rows})
        return stored(rows)


class Unreliable:
    """A part of a store that now and then does not answer, before or after it did what it was asked for."""

    def __init__(self, part: Any, seed: int) -> None:
        self._part = part
        self._random = random.Random(seed)
        self.failing = 0.0

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any, **named: Any) -> Any:
            if self._random.random() < self.failing / 2:
                raise StoreUnavailableError("lost on the way there")
            result = await getattr(self._part, name)(*arguments, **named)
            if self._random.random() < self.failing / 2:
                raise StoreUnavailableError("lost on the way back")
            return result

        return call


def publisher_of(pool: Pool, sink: Any, **fields: Any) -> Publisher:
    """Returns a publisher that has not started."""
    return Publisher("p", sink, pool.published, **{"queue_limit": 10_000, "renew_interval": 0.02, **fields})


def contents(replica: Replica) -> dict[int, tuple[bytes, int]]:
    """Returns what a replica knows."""
    return {block: (cached.identity, cached.index) for block, cached in replica.blocks.items()}


@pytest.mark.parametrize("seed", range(4))
async def test_a_reader_has_the_writers_state_whatever_was_lost(kind: Kind, seed: int) -> None:
    """Random events, failures, trims and flushes, readers that come and go: equal states in the end, every time."""
    pool = Pool(seed)
    journals: Any = Unreliable(kind.store.journals, seed)
    publisher = publisher_of(pool, JournalSink(journals, "p", 1, checkpoint_entries=6), queue_limit=400)
    publisher.start()
    steady, rare = Replica(kind.store.journals, "p"), Replica(kind.store.journals, "p")
    for _ in range(12):
        journals.failing = pool.random.choice([0.0, 0.0, 0.4])
        for _ in range(pool.random.randint(1, 12)):
            publisher.offer([pool.change() for _ in range(pool.random.randint(1, 3))])
            await asyncio.sleep(0)
            if pool.random.random() < 0.3:
                await steady.catch_up()
        if pool.random.random() < 0.25:
            kind.flush()
        journals.failing = 0.0
        await asyncio.wait_for(publisher.settle(), 10)
        for _ in range(200):
            if await steady.catch_up() and contents(steady) == pool.blocks:
                break
            # The server was emptied and the writer has not noticed yet: a renewal tells it.
            await asyncio.sleep(0.01)
        assert contents(steady) == pool.blocks
        if pool.random.random() < 0.3:
            assert await rare.catch_up()
            assert contents(rare) == pool.blocks
    fresh = Replica(kind.store.journals, "p")
    assert await fresh.catch_up()
    assert contents(fresh) == pool.blocks
    await publisher.close(end=True)
    assert not await fresh.catch_up()
    assert fresh.blocks == {}


@pytest.mark.parametrize("seed", range(2))
async def test_hints_are_those_of_the_pool_whatever_was_lost(kind: Kind, seed: int) -> None:
    """Otherwise a failure leaves hints that nobody removes, or takes away some that nobody gives back."""
    pool = Pool(seed)
    hints: Any = Unreliable(kind.store.hints, seed)
    publisher = publisher_of(pool, HintSink(hints, SPACE, OWNER, 3000, 30.0))
    publisher.start()
    seen: dict[bytes, int] = {}
    for _ in range(6):
        hints.failing = pool.random.choice([0.0, 0.4])
        for _ in range(10):
            publisher.offer([pool.change()])
            seen.update({content[0]: content[1] for content in pool.blocks.values()})
            await asyncio.sleep(0)
        if pool.random.random() < 0.3:
            kind.flush()
        hints.failing = 0.0
        expected = {digest for digest, index in pool.blocks.values() if index % 4 == 3}
        for _ in range(200):
            await asyncio.wait_for(publisher.settle(), 10)
            found = {digest for digest in seen if await kind.store.hints.find(SPACE.key, digest)}
            if found == expected:
                break
            await asyncio.sleep(0.01)
        assert found == expected
    await publisher.close(end=True)
    assert not [digest for digest in seen if await kind.store.hints.find(SPACE.key, digest)]


class Stuck:
    """A sink that never answers."""

    name = "stuck"

    def __init__(self) -> None:
        self.released = asyncio.Event()
        self.begun: list[int] = []
        self.written: list[int] = []

    async def begin(self, published: BlocksStored) -> None:  # noqa: D102
        self.begun.append(len(published.blocks))

    async def write(self, events: Sequence[CacheEvent]) -> None:  # noqa: D102
        await self.released.wait()
        self.written.append(records.rows_of(events))

    def wants_checkpoint(self) -> bool:  # noqa: D102
        return False

    async def checkpoint(self, published: BlocksStored) -> None:  # noqa: D102
        raise AssertionError

    async def renew(self) -> None:  # noqa: D102
        return

    async def end(self) -> None:  # noqa: D102
        await asyncio.Event().wait()


async def test_an_overflow_is_a_gap_that_ends_with_a_snapshot() -> None:
    """Otherwise a slow store takes all memory, or events are lost without anyone knowing."""
    pool, sink = Pool(1), Stuck()
    publisher = publisher_of(pool, sink, queue_limit=100)
    publisher.start()
    await publisher.settle()
    with structlog.testing.capture_logs() as logs:
        for _ in range(200):
            publisher.offer([pool.change()])
            assert publisher._queued_rows <= 100
            await asyncio.sleep(0)
        assert publisher.statistics.overflow_count
        assert not publisher.is_exact
        sink.released.set()
        await asyncio.wait_for(publisher.settle(), 5)
    assert [entry["event"] for entry in logs] == ["store_tail_overflowed", "store_tail_resumed"]
    assert sink.begun[-1] == len(pool.blocks)
    assert publisher.statistics.snapshot_count == len(sink.begun)
    await publisher.close(end=False)


async def test_closing_does_not_wait_for_a_store_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a store that hangs keeps the service from stopping."""
    monkeypatch.setattr(publishing, "_END_SECONDS", 0.05)
    pool, sink = Pool(1), Stuck()
    publisher = publisher_of(pool, sink)
    publisher.start()
    publisher.offer([pool.change()])
    await asyncio.sleep(0)
    await asyncio.wait_for(publisher.close(end=True), 5)


class Deaf:
    """A sink that takes a cancellation for a store that does not answer, as a client library may."""

    name = "deaf"

    def __init__(self) -> None:
        self.begun = asyncio.Event()

    async def begin(self, published: BlocksStored) -> None:  # noqa: D102
        del published
        self.begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise StoreUnavailableError("timed out") from None

    async def end(self) -> None:  # noqa: D102
        return


async def test_closing_does_not_depend_on_a_cancellation_that_is_heard() -> None:
    """A service that writes on after it was told to stop never ends."""
    sink = Deaf()
    publisher = publisher_of(Pool(1), sink)
    publisher.start()
    await sink.begun.wait()
    await asyncio.wait_for(publisher.close(end=True), 5)


async def test_a_defect_in_a_sink_is_logged_and_does_not_end_the_tail() -> None:
    """Otherwise one bad event silently ends the sharing of a pool."""

    class Defective(Stuck):
        async def write(self, events: Sequence[CacheEvent]) -> None:
            if not self.written:
                self.written.append(0)
                raise KeyError("defect")
            self.written.append(records.rows_of(events))

    pool, sink = Pool(1), Defective()
    publisher = publisher_of(pool, sink)
    publisher.start()
    await publisher.settle()
    with structlog.testing.capture_logs() as logs:
        publisher.offer([pool.change()])
        await asyncio.sleep(0)
        await asyncio.wait_for(publisher.settle(), 5)
        publisher.offer([pool.change()])
        await asyncio.wait_for(publisher.settle(), 5)
    assert [entry["event"] for entry in logs] == ["store_tail_failed", "store_tail_interrupted", "store_tail_resumed"]
    assert len(sink.begun) == 2
    assert len(sink.written) == 2
    await publisher.close(end=False)


def test_entries_are_small_and_say_what_was_encoded() -> None:
    """Otherwise the journal of a large pool costs more than it should, or says something else."""
    run = [(1000 + row, identity(row), row) for row in range(640)]
    entries = list(records.encode([stored(run)]))
    assert len(entries) == 10
    assert sum(map(len, entries)) <= 19 * len(run)
    pool = Pool(3)
    events = [pool.change() for _ in range(200)]
    decoded = [record for entry in records.encode(events) for record in records.decode(entry)]
    state: dict[int, tuple[bytes, int]] = {}
    for record in decoded:
        assert len(record.blocks) <= records.ENTRY_ROWS
        if record.kind == records.RecordKind.CLEARED:
            state.clear()
        for row, block in enumerate(record.blocks.tolist()):
            if record.kind == records.RecordKind.STORED:
                state[block] = (record.identities[16 * row : 16 * row + 16], int(record.indexes[row]))
            else:
                assert state.pop(block) == (record.identities[16 * row : 16 * row + 16], int(record.indexes[row]))
    assert state == pool.blocks


@pytest.mark.parametrize("damage", ["cut", "longer", "kind"])
def test_an_entry_that_is_damaged_is_an_error(damage: str) -> None:
    """Otherwise it is read as something else."""
    (entry,) = records.encode([stored([(5, identity(1), 2), (6, identity(2), 3)])])
    bad = {"cut": entry[:-1], "longer": entry + b"\x01", "kind": b"\x09" + entry[1:]}[damage]
    with pytest.raises(CorruptionError, match="journal entry"):
        records.decode(bad)


async def test_a_pool_that_is_idle_is_written_again_after_a_flush(kind: Kind) -> None:
    """Otherwise what does not change is missing for good."""
    pool = Pool(2)
    pool.change()
    store: Store = kind.store
    publisher = publisher_of(pool, JournalSink(store.journals, "p", 1))
    publisher.start()
    await publisher.settle()
    kind.flush()
    replica = Replica(store.journals, "p")
    for _ in range(500):
        if await replica.catch_up():
            break
        await asyncio.sleep(0.01)
    assert contents(replica) == pool.blocks
    await publisher.close(end=False)
