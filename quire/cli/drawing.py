"""Draws block tables."""

from __future__ import annotations

from typing import Final

from rich.text import Text

from protos.memsvc.v1 import admin_pb2
from quire.cli.output import enum_name, format_seconds
from quire.units import div_ceil

_EIGHTHS: Final = " ▏▎▍▌▋▊▉█"
_BAR_WIDTH: Final = 4
_CELL_WIDTH: Final = 15
_INDEX_WIDTH: Final = 6


def fill_bar(written: int, block_size: int) -> str:
    """Returns a bar of four characters that shows how much of a block is written."""
    eighths = round(written * _BAR_WIDTH * 8 / block_size)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(_BAR_WIDTH, "·")


def _cell(entry: admin_pb2.BlockTableEntry, block_size: int) -> Text:
    """Returns one block: its id, its fill, and whether it is shared (x2) or matchable (•)."""
    shared = f"x{entry.ref_count}" if entry.ref_count > 1 else ""
    style = "cyan" if shared else "green" if entry.identity else "yellow"
    mark = shared + ("•" if entry.identity else "")
    bar = fill_bar(entry.written_token_count, block_size)
    return Text.assemble(f"{entry.block_id:>6} ", (bar, style), (mark.ljust(_CELL_WIDTH - 7 - _BAR_WIDTH), style))


def draw_block_table(table: admin_pb2.GetBlockTableResponse, width: int = 80) -> Text:
    """Returns the block table of a sequence as a picture at most `width` characters wide.

    A row holds as many blocks as fit, and begins with the position of its first block in the table.
    """
    sequence, entries = table.sequence, table.entries
    state = enum_name(sequence.DESCRIPTOR.fields_by_name["state"], sequence.state)
    picture = Text(no_wrap=True)
    picture.append(f"sequence {sequence.sequence_id}", "bold")
    picture.append(f"  pool {sequence.pool_id}  {state} for {format_seconds(sequence.age)}\n")
    picture.append(
        f"{sequence.token_count} tokens: {sequence.written_token_count} written, {sequence.committed_token_count} "
        f"matchable, {sequence.cached_token_count} from the cache; "
        f"{len(entries)} blocks of {table.block_size} tokens\n\n"
    )
    per_row = max(1, (width - _INDEX_WIDTH) // _CELL_WIDTH)
    for start in range(0, len(entries), per_row):
        picture.append(f"{start:>{_INDEX_WIDTH - 2}}: ", "dim")
        for entry in entries[start : start + per_row]:
            picture.append(_cell(entry, table.block_size))
        picture.append("\n")
    shared = sum(entry.ref_count > 1 for entry in entries)
    picture.append(f"\nblock id and fill; • prompts can match it, xn it is in n tables ({shared} shared)", "dim")
    return picture


def count_remark(table: admin_pb2.GetBlockTableResponse, token_count: int) -> tuple[bool, str]:
    """Returns whether the table has the blocks that `token_count` tokens need and no more, and a sentence about it."""
    needed = div_ceil(token_count, table.block_size)
    found = len(table.entries)
    sentence = f"{token_count} tokens / {table.block_size} a block = {needed} blocks, and the table has {found}"
    return found == needed, sentence
