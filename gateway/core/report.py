"""What the memory service hears of a sequence, and when.

It has to know of a sequence when that fills a block (the block can be matched then), when its prompt is written, when
its first write ends a copy (the source is let go), when a block falls outside the sliding window (it is released),
and what is in its last block before its table closes. In between
nothing changes for anybody but the sequence itself, so nothing is said: a step costs what changed, not what runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.core.sequence import Sequence
    from quire.memory import JournalEntry


def report_at(sequence: Sequence, block_size: int, window: int = 0, *, copying: bool = False) -> int:
    """Returns how many tokens have to be computed until the memory service is to hear of the sequence again.

    Args:
        sequence: the sequence, `computed` up to date.
        block_size: tokens in a block.
        window: positions that a query reads, 0 for all; see `quire.window`.
        copying: whether its first write follows a copy.
    """
    computed = sequence.computed
    # A beam may be forked after every token.
    if copying or sequence.stepwise:
        return computed + 1
    filled = computed - computed % block_size + block_size
    if window:
        # One more block is outside the window then.
        filled = min(filled, (sequence.released + 1) * block_size + window - 1)
    return min(filled, sequence.prompt_length) if computed < sequence.prompt_length else filled


def report(sequence: Sequence, journal: JournalEntry) -> None:
    """Adds a row with all tokens that are known and how many of them are computed."""
    tokens, reported = sequence.tokens, sequence.reported
    known = len(tokens)
    journal.tables.append(sequence.table)
    journal.token_starts.append(reported)
    journal.token_counts.append(known - reported)
    journal.token_ids.extend(tokens[reported:])
    # Steps in flight behind the last token compute on.
    journal.written_counts.append(min(sequence.computed, known))
    sequence.reported = known
