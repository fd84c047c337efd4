"""The growth lease keeps a small stock and asks early."""

from __future__ import annotations

from gateway.core.lease import GrowthLease


def test_an_idle_gateway_asks_for_nothing() -> None:
    """Memory must not be held by a gateway that runs nothing."""
    assert GrowthLease(1000).shortfall(0) == 0


def test_the_stock_is_small_next_to_the_pool() -> None:
    """Blocks in a stock are used by nobody: at most 1 % of a large pool, 32 of a medium, an eighth of a small one."""
    assert GrowthLease(100_000).shortfall(5000) == 1000
    assert GrowthLease(1_000).shortfall(5000) == 32
    assert GrowthLease(40).shortfall(5000) == 5
    assert GrowthLease(4).shortfall(5000) == 1


def test_a_refill_is_asked_for_at_half_and_only_once() -> None:
    """A step must not wait for blocks, and the memory service must not be asked for the same blocks twice."""
    lease = GrowthLease(10_000)
    lease.refilled(list(range(1, 11)), 10)
    assert lease.shortfall(10) == 0
    for _ in range(5):
        lease.take()
    assert lease.shortfall(10) == 5
    lease.refilling = True
    assert lease.shortfall(10) == 0


def test_unmet_demand_is_asked_for_beyond_the_target() -> None:
    """When many sequences fill a block in one step the next refill must cover all of them."""
    lease = GrowthLease(40)
    lease.note_demand(12)
    assert lease.shortfall(12) == 12
    lease.refilled([1, 2, 3], 12)
    assert not lease.exhausted
    lease.refilled([], 9)
    assert lease.exhausted


def test_blocks_are_taken_in_the_order_of_the_grant_and_surrendered_from_the_end() -> None:
    """Deterministic runs need a deterministic order."""
    lease = GrowthLease(1000)
    lease.refilled([7, 8, 9, 10], 4)
    assert lease.take() == 7
    assert sorted(lease.surrender(2)) == [9, 10]
    assert lease.take() == 8
    assert lease.take() is None
    assert lease.granted_total == 4
