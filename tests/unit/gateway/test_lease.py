"""The growth lease keeps a small stock and asks early."""

from __future__ import annotations

from gateway.core.lease import GrowthLease


def test_an_idle_gateway_asks_for_nothing() -> None:
    """Memory must not be held by a gateway that runs nothing."""
    assert GrowthLease(1000).shortfall([], 1) == 0


def test_the_stock_is_what_the_next_steps_need_and_small_next_to_the_pool() -> None:
    """Blocks in a stock are used by nobody: what is needed soon, and at most 1 % of the pool if that will do."""
    rooms = [room for room in range(16) for _ in range(100)]
    assert GrowthLease(1_000_000).shortfall(rooms, 1) == 1600
    assert GrowthLease(90_000).shortfall(rooms, 1) == 900
    assert GrowthLease(1000).shortfall(rooms, 1) == 400
    assert GrowthLease(1000).shortfall([200, 16], 1) == 0


def test_sequences_that_fill_their_blocks_together_find_theirs_in_time() -> None:
    """A batch that began together grows together: all of it would sit out a step every block_size tokens."""
    lease = GrowthLease(1000)
    assert lease.shortfall([4] * 64, 1) == 0
    assert lease.shortfall([3] * 64, 2) == 64


def test_a_refill_is_asked_for_at_half_and_only_once() -> None:
    """A step must not wait for blocks, and the memory service must not be asked for the same blocks twice."""
    lease = GrowthLease(10_000)
    rooms = list(range(10))
    assert lease.shortfall(rooms, 1) == 10
    lease.refilled(list(range(1, 11)), 10)
    assert lease.shortfall(rooms, 2) == 0
    for _ in range(5):
        lease.take()
    assert lease.shortfall(rooms, 3) == 5
    lease.refilling = True
    assert lease.shortfall(rooms, 4) == 0


def test_needs_are_looked_at_again_when_half_of_the_steps_are_over() -> None:
    """A stock that was enough for a few sequences must not be taken as enough for all that came since."""
    lease = GrowthLease(100_000)
    assert lease.shortfall([1, 2], 1) == 2
    lease.refilled([1, 2], 2)
    assert lease.shortfall([0] * 50, 2) == 0
    assert lease.shortfall([0] * 50, 9) == 48


def test_unmet_demand_is_asked_for_beyond_the_target() -> None:
    """When many sequences fill a block in one step the next refill must cover all of them."""
    lease = GrowthLease(40)
    lease.note_demand(12)
    assert lease.shortfall([], 1) == 12
    lease.refilled([1, 2, 3], 12)
    assert not lease.exhausted
    lease.refilled([], 9)
    assert lease.exhausted


def test_while_somebody_waits_only_what_may_be_spent_is_asked_for() -> None:
    """Blocks in stock are taken from those that a preempted sequence hopes to find again."""
    lease = GrowthLease(1000)
    lease.sparing = True
    lease.note_demand(2)
    assert lease.shortfall([0] * 20, 1) == 2
    lease.refilled([5], 2)
    lease.note_demand(1)
    assert lease.shortfall([0] * 20, 2) == 0


def test_blocks_are_taken_in_the_order_of_the_grant_and_surrendered_from_the_end() -> None:
    """Deterministic runs need a deterministic order."""
    lease = GrowthLease(1000)
    lease.refilled([7, 8, 9, 10], 4)
    assert lease.take() == 7
    assert sorted(lease.surrender(2)) == [9, 10]
    assert lease.take() == 8
    assert lease.take() is None
    assert lease.granted_total == 4
