"""Who copies before it writes, and who writes in place: the gateway's half of copy-on-write."""

from __future__ import annotations

import random

from gateway.core.sharing import SharedTails


def test_everybody_copies_but_the_last_holder() -> None:
    """Otherwise a sample overwrites another's keys and values, or the last one copies for nothing."""
    shared = SharedTails()
    shared.forked(1, [2, 3], 9, must_copy=False)
    assert [shared.must_copy(table) for table in (1, 2, 3, 4)] == [True, True, True, False]
    assert shared.left(2) == 0
    assert [shared.must_copy(table) for table in (1, 2, 3)] == [True, False, True]
    assert shared.left(1) == 3, "who is alone now writes in place"
    assert [shared.must_copy(table) for table in (1, 2, 3)] == [False, False, False]
    assert len(shared) == 0


def test_a_table_that_ends_leaves_what_it_shared() -> None:
    """Otherwise the last sample copies a block that nobody else names any more."""
    shared = SharedTails()
    shared.forked(1, [2], 9, must_copy=False)
    shared.left(2)
    shared.left(2)
    shared.left(7)
    assert not shared.must_copy(1)


def test_a_child_from_the_middle_of_a_full_block_copies_it_even_alone() -> None:
    """Otherwise it overwrites what prompts can match."""
    shared = SharedTails()
    shared.forked(1, [2, 3], 5, must_copy=True)
    assert not shared.must_copy(1), "the source writes elsewhere"
    shared.left(2)
    assert shared.must_copy(3)
    shared.left(3)
    assert not shared.must_copy(3)


def test_a_fork_of_a_fork_joins_the_holders() -> None:
    """Otherwise a branch of a branch is forgotten, and its block written by another."""
    shared = SharedTails()
    shared.forked(1, [2], 9, must_copy=False)
    shared.forked(2, [3], 9, must_copy=False)
    shared.left(1)
    assert (shared.must_copy(2), shared.must_copy(3)) == (True, True)
    shared.left(2)
    assert not shared.must_copy(3)


def test_it_agrees_with_counting_who_names_the_block() -> None:
    """Otherwise some order of forks and ends leaves a holder out."""
    source = random.Random(4)
    shared = SharedTails()
    names: dict[int, int] = {1: 100}
    blocks, tables = 100, 1
    for _ in range(3000):
        table = source.choice(sorted(names))
        others = [other for other, block in names.items() if block == names[table] and other != table]
        assert shared.must_copy(table) == bool(others)
        action = source.random()
        if action < 0.4 and len(names) < 12:
            tables += 1
            shared.forked(table, [tables], names[table], must_copy=False)
            names[tables] = names[table]
        elif action < 0.7 and others:
            blocks += 1
            shared.left(table)
            names[table] = blocks
        elif len(names) > 1:
            shared.left(table)
            del names[table]
    shared.clear()
    assert len(shared) == 0
