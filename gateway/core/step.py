"""What a step is made of, before and after it travels."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

from quire.memory import JournalEntry

if TYPE_CHECKING:
    from gateway.core.sequence import Sequence

LOGPROB_CHUNK: Final = 256
"""Most tokens of a prompt in a step if their log-probabilities are to be reported."""


@dataclasses.dataclass(slots=True)
class StepDraft:
    """A step to run; the lists are the columns of `quire.execsvc.v1.StepPlan`."""

    removed: list[int] = dataclasses.field(default_factory=list)
    added: list[Sequence] = dataclasses.field(default_factory=list)
    appended: list[int] = dataclasses.field(default_factory=list)
    copies: list[int] = dataclasses.field(default_factory=list)
    replaced: list[int] = dataclasses.field(default_factory=list)
    """(table, index, block) flat: blocks that take the place of shared ones, which `copies` names as their sources."""
    scheduled_tables: list[int] = dataclasses.field(default_factory=list)
    scheduled_counts: list[int] = dataclasses.field(default_factory=list)
    swap_out: list[int] = dataclasses.field(default_factory=list)
    """(block, slot) flat; see `gateway.core.swapping`."""
    swap_in: list[int] = dataclasses.field(default_factory=list)
    """(slot, block) flat."""
    swap_freed: list[int] = dataclasses.field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.removed or self.added or self.scheduled_tables or self.swap_freed)


@dataclasses.dataclass(frozen=True, slots=True)
class LogprobRow:
    """Log-probabilities at one position of a sequence; see `quire.execsvc.v1.Logprobs`."""

    table: int
    position: int
    rank: int
    token_ids: list[int]
    """The token that is there, then the most likely ones."""
    values: list[float]


@dataclasses.dataclass(slots=True)
class StepOutcome:
    """What came of a step; the lists are the columns of `quire.execsvc.v1.StepResult`."""

    written_tables: list[int]
    written_counts: list[int]
    sampled_tables: list[int]
    sampled_tokens: list[int]
    fenced: list[int]
    errors: list[tuple[int, str, str]]
    """(table, reason, message)."""
    sibling_tables: list[int] = dataclasses.field(default_factory=list)
    sibling_tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[LogprobRow] = dataclasses.field(default_factory=list)
    swap_refused: list[int] = dataclasses.field(default_factory=list)
    swap_slots_elsewhere: int = 0
    seconds: float = 0.0
    """Time that the executor took for it, 0 if it does not say."""


@dataclasses.dataclass(slots=True)
class Update:
    """What a result changed."""

    journal: JournalEntry
    tokens: list[tuple[Sequence, int]] = dataclasses.field(default_factory=list)
    """New tokens, in order; the caller decides whether each ends its sequence (`finish`)."""
    requeued: list[Sequence] = dataclasses.field(default_factory=list)
    """Preempted sequences whose tables are fenced; they go to the head of the queue."""
    siblings: list[tuple[Sequence, list[Sequence]]] = dataclasses.field(default_factory=list)
    """First samples whose prompts are computed, with the others, which have a first token now and no table yet."""
    logprobs: list[tuple[Sequence, LogprobRow]] = dataclasses.field(default_factory=list)
    """Log-probabilities of prompts and of `tokens`."""
    reported: list[Sequence] = dataclasses.field(default_factory=list)
    """Sequences of which the journal tells."""
    released: list[Sequence] = dataclasses.field(default_factory=list)
    """Sequences that hold nothing any more."""
    failed: list[tuple[Sequence, str, str]] = dataclasses.field(default_factory=list)
    """(sequence, reason, message) of those the executor gave up."""
