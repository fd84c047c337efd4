"""The table of sessions: who is kept, for how long, and what a fork has."""

from __future__ import annotations

from array import array

import pytest

from gateway.core.session import Message, SessionTable, TurnEnd
from quire.errors import (
    InvalidRequestError,
    SessionBusyError,
    SessionExistsError,
    SessionLimitError,
    SessionNotFoundError,
)


def filled(table: SessionTable) -> None:
    """Opens a chat "a" of two turns with 10 tokens each."""
    session = table.create("a", "m", 100.0, 0.0)
    session.tokens = array("I", range(20))
    session.messages = [
        Message("user", "1"),
        Message("assistant", "2"),
        Message("user", "3"),
        Message("assistant", "4"),
    ]
    session.text = "x" * 20
    session.turns = [TurnEnd(10, 2, 10), TurnEnd(20, 4, 20)]


def test_a_session_ends_when_it_had_no_turn_for_its_time_to_live() -> None:
    """Otherwise forgotten conversations fill the gateway, or a live one is lost."""
    table = SessionTable(10)
    filled(table)
    session = table.begin_turn("a", 90.0)
    assert table.get("a", 500.0) is session, "a turn is under way"
    table.end_turn(session, 500.0)
    assert table.get("a", 599.0) is session
    with pytest.raises(SessionNotFoundError, match="'a'"):
        table.get("a", 600.0)
    assert len(table) == 0


def test_one_turn_at_a_time() -> None:
    """Two turns at once would have to be in some order, which nobody said."""
    table = SessionTable(10)
    filled(table)
    session = table.begin_turn("a", 0.0)
    with pytest.raises(SessionBusyError) as caught:
        table.begin_turn("a", 0.0)
    assert caught.value.retry_after
    table.end_turn(session, 0.0)
    assert table.begin_turn("a", 0.0) is session


def test_a_fork_at_the_end_of_a_turn_is_a_chat_and_one_in_the_middle_is_text() -> None:
    """A branch must go on from exactly the tokens that were asked for."""
    table = SessionTable(10)
    filled(table)
    for at_token, messages, turns in ((None, 4, 2), (20, 4, 2), (10, 2, 1), (13, 0, 1), (0, 0, 0)):
        (fork,) = table.fork("a", [f"fork-{at_token}"], at_token, 0.0)
        assert list(fork.tokens) == list(range(20 if at_token is None else at_token))
        assert (len(fork.messages), len(fork.turns), fork.is_chat) == (messages, turns, messages > 0)
        assert fork.parent_id == "a"
    with pytest.raises(InvalidRequestError, match=r"found 21, allowed is 0 .. 20"):
        table.fork("a", ["b"], 21, 0.0)
    table.get("fork-None", 0.0).tokens.append(7)
    assert len(table.get("a", 0.0).tokens) == 20, "branches are apart"


def test_there_are_so_many_sessions_at_most_and_all_forks_or_none() -> None:
    """A client that forks without end must be told so, with when to come back."""
    table = SessionTable(3)
    filled(table)
    with pytest.raises(SessionLimitError) as caught:
        table.fork("a", ["b", "c", "d"], None, 40.0)
    assert caught.value.retry_after == 60.0
    assert len(table) == 1
    with pytest.raises(SessionExistsError):
        table.create("a", "m", 1.0, 0.0)
    table.fork("a", ["b", "c"], None, 40.0)
    assert [session.session_id for session in table.page("a", 10, 40.0)] == ["b", "c"]
    table.delete("b", 40.0)
    table.create("e", "m", 1.0, 40.0)


def test_many_turns_leave_few_entries_behind() -> None:
    """A gateway that lives for months must not remember every turn."""
    table = SessionTable(3)
    filled(table)
    for now in range(1000):
        table.end_turn(table.begin_turn("a", float(now)), float(now))
    assert len(table._expiries) < 100
