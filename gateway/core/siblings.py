"""Further samples of a request begin on the blocks of its first one, with no copy.

The prompt is computed once, by the first sample. The step that computes its last token draws a first token for each
sample (`SequenceStart.sibling_seeds`). The first sample is held there: nobody writes behind the prompt until the
others' tables are forked from its own, or have failed to be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.core.sequence import SequenceState
from quire.errors import InvariantError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.core.sequence import Sequence
    from gateway.core.step import LogprobRow, StepOutcome


def waiting_samples(sequence: Sequence) -> list[Sequence]:
    """Returns the samples that begin when this one has its first token."""
    if sequence.index or len(sequence.request.samples) == 1:
        return []
    return [sample for sample in sequence.request.samples if sample.state is SequenceState.NEW]


def take_first_tokens(
    outcome: StepOutcome, find: Callable[[int], Sequence | None]
) -> list[tuple[Sequence, list[Sequence]]]:
    """Gives samples their first tokens.

    Args:
        outcome: of a step.
        find: returns the sequence of a table.

    Returns:
        (first sample, samples that wait to begin) of each request whose prompt is computed now.

    Raises:
        InvariantError: the executor drew more or fewer tokens than samples wait.
    """
    tokens: dict[int, list[int]] = {}
    for table, token in zip(outcome.sibling_tables, outcome.sibling_tokens, strict=True):
        tokens.setdefault(table, []).append(token)
    begun = []
    for table, firsts in tokens.items():
        source = find(table)
        if source is None or source.request.ended:
            continue
        samples = waiting_samples(source)
        if len(samples) != len(firsts):
            raise InvariantError(f"table {table}: {len(firsts)} first tokens for {len(samples)} samples")
        for sample, token in zip(samples, firsts, strict=True):
            sample.tokens.append(token)
            sample.state = SequenceState.WAITING
        begun.append((source, samples))
    return begun


def assign_logprobs(
    outcome: StepOutcome,
    find: Callable[[int], Sequence | None],
    siblings: list[tuple[Sequence, list[Sequence]]],
) -> list[tuple[Sequence, LogprobRow]]:
    """Returns whose log-probabilities the rows of a step are; those of sequences that have ended are left out.

    Args:
        outcome: of the step.
        find: returns the sequence of a table.
        siblings: from `take_first_tokens`.
    """
    following = {source.table: [source, *samples] for source, samples in siblings}
    found: list[tuple[Sequence, LogprobRow]] = []
    for row in outcome.logprobs:
        sequence = find(row.table)
        if sequence is not None and row.position >= sequence.prompt_length and row.table in following:
            # The table's own token first, then those of its siblings.
            sequence = following[row.table].pop(0)
        if sequence is not None and not sequence.ended:
            found.append((sequence, row))
    return found
