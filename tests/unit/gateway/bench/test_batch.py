"""The bookkeeping that is timed is that of the real scheduler."""

from __future__ import annotations

import pytest

from gateway.bench.batch import DecodeBatch, SchedulerSteps
from gateway.bench.runner import MANY_RUNNING, RUNNING
from gateway.bench.steady import count_steady_run
from memsvc.bench import core
from memsvc.core import invariants
from quire.memory import JournalEntry
from tests.unit.gateway.bench.memories import connected


@pytest.mark.parametrize("block_size", [16, 32])
async def test_in_every_step_one_sequence_of_a_block_size_grows_and_one_fills_its_block(block_size: int) -> None:
    """Otherwise the median is that of a step in which little happens."""
    memory, pool = await connected(block_size)
    batch = DecodeBatch(memory, pool, RUNNING)
    await batch.start()
    memory.entries.clear()
    samples = await batch.steps(2 * block_size)
    for entry in memory.entries:
        assert len(entry.appended) == 3 * RUNNING // block_size
        assert len(entry.tables) == RUNNING // block_size
        assert set(entry.token_counts[: len(entry.tables)]) == {block_size}
    assert len(samples["step"]) == 2 * block_size
    invariants.check(memory.core)
    written = memory.core.pool(core.POOL_ID).memory.tables
    assert int(written.committed.sum()) == sum(sequence.computed // block_size for sequence in batch.sequences)


def shape(entry: JournalEntry, size: int) -> tuple[object, ...]:
    """Returns what a journal costs to apply, whichever tables it is about."""
    rows = zip(entry.token_starts, entry.token_counts, entry.written_counts, strict=True)
    grown = len(set(entry.appended[::3]) & set(entry.tables))
    return grown, len(entry.appended), sorted((start % size, count, written % size) for start, count, written in rows)


@pytest.mark.parametrize("block_size", [16, 64])
async def test_the_journals_that_are_timed_are_those_of_the_real_scheduler(block_size: int) -> None:
    """Otherwise the figures are those of a gateway that does not exist: of rows that it does not send."""
    memory, pool = await connected(block_size)
    batch = DecodeBatch(memory, pool, 128)
    await batch.start()
    memory.entries.clear()
    await batch.steps(2 * block_size)
    timed = [shape(entry, block_size) for entry in memory.entries]
    memory, pool = await connected(block_size)
    real = SchedulerSteps(memory, pool, 128)
    await real.start()
    memory.entries.clear()
    await real.steps(2 * block_size)
    assert [shape(entry, block_size) for entry in memory.entries] == timed
    assert timed[0] == (128 // block_size, 3 * 128 // block_size, [(1, block_size, 0)] * (128 // block_size))
    invariants.check(memory.core)


async def test_with_many_running_as_many_grow_in_the_steps_that_count() -> None:
    """Otherwise the ratio compares steps that do different work."""
    memory, pool = await connected()
    batch = DecodeBatch(memory, pool, MANY_RUNNING // 8, RUNNING // 8)
    await batch.start()
    memory.entries.clear()
    before = [len(sequence.blocks) for sequence in batch.sequences]
    samples = await batch.steps(16)
    assert len(samples["step"]) == batch.quiet_step_count == 12
    assert {(len(entry.appended), len(entry.tables)) for entry in memory.entries[:12]} == {(6, 2)}
    assert [len(sequence.blocks) for sequence in batch.sequences] == [count + 1 for count in before]
    invariants.check(memory.core)


async def test_a_steady_run_awaits_nothing_and_its_leases_are_counted_beside_it() -> None:
    """Otherwise every token may wait for the memory service, and nobody sees it."""
    memory, pool = await connected()
    steady = await count_steady_run(memory, pool, 32, 64)
    assert steady.step_count >= 64
    assert (steady.awaited_count, steady.awaited_per_step * steady.step_count) == (0, steady.stalled_count)
    assert steady.lease_count > 0
