"""Who waits for the beginning of its prompt, how long, and who is beside them."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

from gateway.core.prefix_wait import PATIENCE_SECONDS, WAITING_LIMIT, PrefixWait
from gateway.core.sequence import Sequence


def sequences(count: int) -> list[Sequence]:
    """Returns sequences that wait."""
    request: Any = SimpleNamespace()
    return [Sequence(request, index, array("I", [1, 2, 3]), 10) for index in range(count)]


def test_who_waits_is_taken_when_the_table_has_computed_enough() -> None:
    """Otherwise a request waits longer than for what it needs, or asks again in every step."""
    first, second, third = sequences(3)
    wait = PrefixWait()
    wait.add(first, 7, 32, 0.0)
    wait.add(second, 7, 64, 0.0)
    wait.add(third, 9, 16, 0.0)
    assert wait.take({7: 31}) == []
    assert wait.take({7: 32}) == [first]
    assert wait.take({7: 64}) == [second]
    assert wait.take() == [third]
    assert not wait


def test_nobody_waits_for_ever() -> None:
    """Otherwise a prompt whose twin is held up is held up too."""
    (sequence,) = sequences(1)
    wait = PrefixWait()
    assert wait.may_wait(sequence, 5.0)
    wait.add(sequence, 7, 32, 5.0)
    wait.take()
    assert wait.may_wait(sequence, 5.0 + PATIENCE_SECONDS - 0.01)
    wait.add(sequence, 7, 32, 5.5)
    wait.take()
    assert not wait.may_wait(sequence, 5.0 + PATIENCE_SECONDS)
    wait.forget(sequence)
    assert wait.may_wait(sequence, 5.0 + PATIENCE_SECONDS)


def test_so_many_wait_at_most_and_nothing_is_kept_of_those_who_are_gone() -> None:
    """Otherwise the bound of the queue bounds nothing."""
    wait = PrefixWait()
    for sequence in sequences(WAITING_LIMIT):
        assert wait.may_wait(sequence, 0.0)
        wait.add(sequence, 7, 32, 0.0)
    assert not wait.may_wait(sequences(1)[0], 0.0)
    for round_no in range(1, 5):
        wait.take()
        for sequence in sequences(WAITING_LIMIT):
            wait.add(sequence, 7, 32, 10.0 * round_no)
    assert len(wait._until) <= 3 * WAITING_LIMIT
