"""The picture of a block table."""

import pytest

from protos.memsvc.v1 import admin_pb2
from quire.cli.drawing import count_remark, draw_block_table, fill_bar


def table(token_count: int, block_count: int, *, shared: int = 0) -> admin_pb2.GetBlockTableResponse:
    """Returns a table of 16-token blocks whose first `shared` blocks are in two tables."""
    found = admin_pb2.GetBlockTableResponse(block_size=16)
    found.sequence.sequence_id = "abc/0"
    found.sequence.pool_id = "executor-0"
    found.sequence.state = admin_pb2.SEQUENCE_STATE_OPEN
    found.sequence.token_count = token_count
    for index in range(block_count):
        written = max(0, min(16, token_count - index * 16))
        found.entries.add(
            index=index,
            block_id=100 + index,
            ref_count=2 if index < shared else 1,
            written_token_count=written,
            identity=b"x" * 16 if written == 16 else b"",
        )
    return found


@pytest.mark.parametrize(
    ("written", "bar"), [(0, "····"), (1, "▎···"), (4, "█···"), (8, "██··"), (15, "███▊"), (16, "████")]
)
def test_the_bar_shows_how_full_a_block_is(written: int, bar: str) -> None:
    """The waste inside blocks is what the picture is for."""
    assert fill_bar(written, 16) == bar


def test_a_small_block_and_a_large_one_are_drawn_alike() -> None:
    """Block sizes of 16, 32 and 64 all fit the same picture."""
    assert fill_bar(64, 64) == fill_bar(32, 32) == "████"
    assert fill_bar(32, 64) == "██··"


def test_the_picture_names_every_block_once_and_marks_shared_ones() -> None:
    """A block that is missing from the picture is a block nobody can look for."""
    picture = draw_block_table(table(60, 4, shared=2)).plain
    for block in range(100, 104):
        assert picture.count(f" {block} ") == 1
    assert picture.count("x2•") == 2
    assert "(2 shared)" in picture
    assert "60 tokens" in picture and "4 blocks of 16 tokens" in picture


@pytest.mark.parametrize("width", [10, 21, 40, 80, 200])
def test_the_picture_fits_the_terminal(width: int) -> None:
    """A line that wraps makes a grid unreadable."""
    rows = [line for line in draw_block_table(table(600, 38), width).plain.splitlines() if ": " in line and "█" in line]
    assert sum(line.count("█" * 4) for line in rows) == 37
    assert all(len(line.rstrip()) <= max(width, 21) for line in rows)


def test_blocks_outside_a_sliding_window_are_drawn_as_gone() -> None:
    """A null entry that looks like a block makes people look for a block that is not there."""
    found = table(60, 4)
    found.entries[0].block_id = 0
    picture = draw_block_table(found).plain
    assert "3 blocks of 16 tokens, 1 outside the window released" in picture
    assert " 100 " not in picture and " 101 " in picture


def test_an_empty_table_is_drawn_too() -> None:
    """A sequence can be looked at before its first block is filled."""
    assert "0 blocks" in draw_block_table(table(0, 0)).plain


@pytest.mark.parametrize(("tokens", "blocks", "right"), [(60, 4, True), (64, 4, True), (65, 4, False), (60, 5, False)])
def test_the_remark_compares_blocks_with_tokens(tokens: int, blocks: int, right: bool) -> None:
    """A table with a block too many wastes memory, one with a block too few has lost keys and values."""
    found, sentence = count_remark(table(tokens, blocks), tokens)
    assert found is right
    assert f"the table has {blocks}" in sentence
