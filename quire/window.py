"""Sliding windows: which blocks of a table can still be read. One rule for memory, gateway and executor.

In a model whose layers all attend to the last `window` positions, the query at position p reads the keys and values at
p - window + 1 .. p. An executor computes each position of a table once and in order, and what it has confirmed as
written it has computed. So with n tokens confirmed, every query in flight, planned or yet to come is at n or later, and
reads nothing before n - window + 1: a block that ends before that is outside the window for good. It may be released
at once, with no fence: a step in flight that is given the block's number still has no query that sees it, and whoever
gets the block next writes to it in a step planned after the release.

    confirmed n:          |<---- window - 1 ---->| n ->
    blocks:   [ 0 ][ 0 ][ 0 ][   ][   ][   ][   ][   ]      0: outside, released
"""

from __future__ import annotations

from quire.units import div_ceil


def outside_block_count(written: int, window: int, block_size: int) -> int:
    """Returns how many leading blocks of a table lie wholly outside the window.

    Block i holds positions i * block_size .. (i + 1) * block_size - 1 and is outside if its last one is before
    written - window + 1, that is if (i + 1) * block_size <= written - window + 1.

    Args:
        written: tokens confirmed as written: no later query is before that position.
        window: positions that a query reads, its own included; 0 for all.
        block_size: tokens in a block.
    """
    return max(0, (written - window + 1) // block_size) if window else 0


def hit_block_count(window: int, block_size: int) -> int:
    """Returns how many blocks before a block boundary must be there to go on from it: they hold window - 1 tokens."""
    return max(1, div_ceil(window - 1, block_size))


def window_block_count(window: int, block_size: int) -> int:
    """Returns the most blocks that hold what one query reads, and the block that it writes to."""
    return hit_block_count(window, block_size) + 1
