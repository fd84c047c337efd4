"""What a policy of allocation must offer, so that one scheduler can run on any of them."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from quire.memory import Admission, AdmitRequest, JournalEntry, PoolInfo


@dataclasses.dataclass(frozen=True, slots=True)
class Wish:
    """A request for a table, with what only a simulation can know.

    Attributes:
        request: what a gateway would send.
        output_length: tokens that the request will have generated at its end, those generated so far included.
        prompt_length: tokens of the prompt alone.
    """

    request: AdmitRequest
    output_length: int
    prompt_length: int


class Policy(Protocol):
    """Decides which slots of one pool a sequence gets, and when.

    A policy grants blocks by id whatever the shape of its extents, so that the scheduler runs on it unchanged: one that
    reserves the whole length at admission grants every block then, and is never asked for another.
    """

    @property
    def pool(self) -> PoolInfo:
        """The pool."""
        ...

    def admit(self, wish: Wish) -> Admission:
        """Opens a table or changes nothing.

        Raises:
            BlockPoolExhaustedError: there is no room now.
            PromptTooLongError: there never will be.
        """
        ...

    def lease(self, granted_total: int) -> list[int]:
        """Brings the blocks ever granted for growth up to `granted_total`; returns the new ones, maybe too few."""
        ...

    def journal(self, entry: JournalEntry) -> None:
        """Takes what happened: growth, tokens, closed tables, returned blocks."""
        ...

    def shared_block_count(self) -> int:
        """Returns how many table entries name a block that another entry names too, the first of each not counted."""
        ...
