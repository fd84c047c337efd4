"""What a step is made of, before and after it travels."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.core.sequence import Sequence


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

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.removed or self.added or self.scheduled_tables)


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
