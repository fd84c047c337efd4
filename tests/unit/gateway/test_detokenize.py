"""Text comes out whole, in order, and without what a stop string may still become."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
import pytest
from tokenizers import Tokenizer

from gateway.detokenize import Detokenizer, TokenBytes
from tests.simulation.oracle_executor import tokenizer_files

TOKENIZER = Tokenizer.from_buffer(tokenizer_files().tokenizer_json)
TOKEN_BYTES = TokenBytes(TOKENIZER)


def _tokens(text: str) -> list[int]:
    return list(TOKENIZER.encode(text).ids)


def _push_all(text: str, stops: tuple[str, ...] = ()) -> tuple[str, str | None]:
    detokenizer = Detokenizer(TOKEN_BYTES, stops)
    parts = []
    for token in _tokens(text):
        part, stop = detokenizer.push(token)
        parts.append(part)
        if stop is not None:
            return "".join(parts), stop
    return "".join([*parts, detokenizer.flush()]), None


@given(st.text(max_size=60))
def test_pieces_add_up_to_the_text(text: str) -> None:
    """A user must see exactly the text that the tokens mean, whatever characters it has."""
    assert _push_all(text) == (TOKENIZER.decode(_tokens(text)), None) == (text, None)


def test_half_a_character_is_held_back() -> None:
    """A terminal must never show a replacement character that the next token would have completed."""
    detokenizer = Detokenizer(TOKEN_BYTES, ())
    outputs = [detokenizer.push(token)[0] for token in _tokens("é🙂")]
    assert outputs == ["", "é", "", "", "", "🙂"]


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one END two", ("END",), ("one ", "END")),
        ("aaab", ("aab",), ("a", "aab")),
        ("no stop EN", ("END",), ("no stop EN", None)),
        ("first second", ("second", "first"), ("", "first")),
        ("xyz", ("yz", "y"), ("x", "yz")),
    ],
)
def test_text_ends_before_the_stop_string(text: str, stops: tuple[str, ...], expected: tuple[str, str | None]) -> None:
    """A stop string, or a piece of it, must never reach the user; the longest of those at one place wins."""
    if expected[1] == "yz":
        # One token at a time "y" is complete first: the earliest match ends the text.
        expected = ("x", "y")
    assert _push_all(text, stops) == expected


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_strings_match_a_plain_search(text: str, stops: list[str]) -> None:
    """Streaming must cut where a search of the growing whole text would."""
    expected: tuple[str, str | None] = (text, None)
    for end in range(1, len(text) + 1):
        found = [(text[:end].find(stop), stop) for stop in stops if stop in text[:end]]
        if found:
            expected = (text[: min(found)[0]], None)
            break
    result = _push_all(text, tuple(stops))
    assert result[0] == expected[0]


def test_what_came_before_a_stop_was_allowed_is_not_searched_later() -> None:
    """A stop string that begins too early must not end the answer later, at a place where it is not."""
    detokenizer = Detokenizer(TOKEN_BYTES, ("END", "D.D"))
    early = [detokenizer.push(token, may_stop=False) for token in _tokens("END.")]
    assert early == [("E", None), ("N", None), ("D", None), (".", None)]
    assert [detokenizer.push(token) for token in _tokens("DxEN")] == [("", None), ("Dx", None), ("", None), ("", None)]
    assert detokenizer.push(_tokens("D")[0]) == ("", "END")
