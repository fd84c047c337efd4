"""Draws block tables and pools."""

from __future__ import annotations

from typing import Final

from rich.text import Text

from protos.memsvc.v1 import admin_pb2
from quire.cli.output import format_seconds, state_name
from quire.units import div_ceil, format_bytes

_EIGHTHS: Final = " ▏▎▍▌▋▊▉█"
_BAR_WIDTH: Final = 4
_CELL_WIDTH: Final = 15
_INDEX_WIDTH: Final = 6
_WIDEST_BAR: Final = 100


def fill_bar(written: int, block_size: int) -> str:
    """Returns a bar of four characters that shows how much of a block is written."""
    eighths = round(written * _BAR_WIDTH * 8 / block_size)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(_BAR_WIDTH, "·")


def _cell(entry: admin_pb2.BlockTableEntry, block_size: int) -> Text:
    """Returns one block: its id, its fill, and whether it is shared (x2) or matchable (•); a dash for none."""
    if not entry.block_id:
        return Text("     -".ljust(_CELL_WIDTH), "dim")
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
    released = sum(entry.block_id == 0 for entry in entries)
    picture = Text(no_wrap=True)
    picture.append(f"sequence {sequence.sequence_id}", "bold")
    picture.append(f"  pool {sequence.pool_id}  {state_name(sequence)} for {format_seconds(sequence.age)}\n")
    picture.append(
        f"{sequence.token_count} tokens: {sequence.written_token_count} written, {sequence.committed_token_count} "
        f"matchable, {sequence.cached_token_count} from the cache; "
        f"{len(entries) - released} blocks of {table.block_size} tokens"
        f"{f', {released} outside the window released' if released else ''}\n\n"
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


SEQUENCE_COLUMNS: Final = (
    *(("SEQUENCE", False), ("POOL", False), ("TOKENS", True), ("CACHED", True), ("BLOCKS", True)),
    *(("AGE", True), ("STATE", False)),
)


def sequence_row(sequence: admin_pb2.SequenceSummary) -> tuple[object, ...]:
    """Returns a sequence's cells below SEQUENCE_COLUMNS."""
    return (
        *(sequence.sequence_id, sequence.pool_id, sequence.token_count, sequence.cached_token_count),
        *(sequence.block_count, format_seconds(sequence.age), state_name(sequence)),
    )


def _share(part: int, whole: int) -> str:
    """Returns a part in percent; a dash when there is no whole."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _pool_bar(parts: list[tuple[str, int, str]], width: int) -> Text:
    """Returns a bar of `width` characters: each part as long as its share, and never invisible if it is not zero."""
    total = sum(count for _, count, _ in parts)
    *first, (_, rest, rest_style) = parts
    bar = Text()
    for _, count, style in first:
        if count:
            bar.append("█" * max(1, round(width * count / total)), style)
    left = max(1 if rest else 0, width - len(bar))
    return bar + Text("░" * left, rest_style)


def draw_pool(pool: admin_pb2.Pool, width: int = 80) -> Text:
    """Returns a pool and where its blocks are."""
    spec = pool.spec
    parts = [
        ("used", pool.used_block_count, "cyan"),
        ("cached", pool.cached_block_count, "green"),
        ("leased", pool.leased_block_count, "yellow"),
        ("pending free", pool.pending_free_block_count, "magenta"),
        ("free", pool.free_block_count, "dim"),
    ]
    picture = Text.assemble(
        (f"pool {pool.pool_id}", "bold"),
        f"  {state_name(pool)}, epoch {pool.epoch}, executor at {pool.executor_address}\n",
        f"{spec.model_id}, {spec.kv_dtype}: {spec.block_count - 1} blocks of {spec.block_size} tokens, "
        f"{format_bytes(spec.block_count * spec.bytes_per_block)}\n",
    )
    picture.append(_pool_bar(parts, min(width - 1, _WIDEST_BAR)))
    picture.append("\n")
    for name, count, style in parts:
        picture.append("█ " if name != "free" else "░ ", style)
        picture.append(f"{name} {count}   ")
    slots = pool.used_block_count * spec.block_size
    picture.append(
        f"\n{pool.sequence_count} sequences hold {pool.used_token_count} tokens in {slots} slots "
        f"({_share(pool.used_token_count, slots)}); prefix hits "
        f"{_share(pool.prefix_hit_token_count, pool.prefix_query_token_count)}; {pool.preemption_count} preemptions, "
        f"{pool.swap_count} of them by swap\n"
    )
    return picture
