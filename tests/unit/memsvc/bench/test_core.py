"""What is measured of the core is the work that the figures claim."""

from __future__ import annotations

from memsvc.bench import core
from memsvc.core import invariants


async def test_admissions_are_cold_and_then_cached_and_leave_nothing_behind() -> None:
    """Otherwise a figure is that of another case than its name says."""
    admissions = core.Admissions(64)
    await admissions.start()
    samples = await admissions.sample()
    memory = admissions._memory.core
    invariants.check(memory)
    pool = memory.pool(core.POOL_ID).memory
    assert pool.tables.open_count == 0
    # Every second prompt was found as a whole, but for the token to compute.
    assert pool.statistics.hit_token_count * 2 == pool.statistics.query_token_count - 2 * len(samples["cold_admit"])
    assert {len(values) for values in samples.values()} == {len(samples["admit_8192_cached"])}
    for whole, one, other in zip(
        samples["admit_8192_cold"], samples["cold_admit"], samples["cold_commit"], strict=True
    ):
        assert abs(whole - one - other) < 1e-9
    await admissions.close()


def test_blocks_are_timed_apart_for_taking_and_freeing() -> None:
    """Otherwise one figure hides the other."""
    samples = core.take_free()
    assert len(samples["take_100"]) == len(samples["free_100"]) > 1
    assert min(samples["take_100"] + samples["free_100"]) > 0


def test_the_bytes_of_a_cached_block_hold_at_least_its_tokens() -> None:
    """Otherwise the figure leaves something out."""
    (per_block,) = core.cached_bytes(16)["bytes_per_cached_block"]
    assert per_block > 16 * 4 + 2 * 16
