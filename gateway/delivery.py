"""What the engine tells of a request, to whoever delivers it to a client.

Tokens are told, not text: whoever delivers them makes text of them, beside the client. Only where a stop string may end
the completion the engine has to read it itself, and then it says what it read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from gateway.core.step import LogprobRow
    from protos.gateway.v1 import gateway_pb2 as pb
    from quire.errors import QuireError


class Answer(NamedTuple):
    """A completion that is answered as a whole: one that a search has found."""

    tokens: list[int]
    shown_count: int
    """Leading tokens whose text is shown; the others end it."""
    ending: pb.Ending


class Delivery(Protocol):
    """Hears of one request, in the order in which things happen; never waits."""

    def admitted(self, event: pb.Admitted) -> None:
        """The request has left the queue."""
        ...

    def push(self, index: int, token: int, text: str | None = None) -> None:
        """A sample has a new token; `text` is what is certain now, if it is not simply what the tokens spell."""
        ...

    def push_logprob(self, index: int, row: LogprobRow) -> None:
        """The token of a sample that is pushed next has log-probabilities."""
        ...

    def prompt_logprobs(self, rows: list[LogprobRow]) -> None:
        """The prompt has log-probabilities: of all its tokens but the first."""
        ...

    def select(self, indexes: list[int]) -> None:
        """Lets the samples of these indexes be answered, in this order, and no others."""
        ...

    def answer(self, samples: list[Answer]) -> None:
        """Answers these samples, and nothing of what was pushed."""
        ...

    def end(self, index: int, ending: pb.Ending, text: str = "") -> None:
        """A sample has its last token; `text` was held back until then."""
        ...

    def finish(self, usage: pb.Usage) -> None:
        """Every sample has ended."""
        ...

    def fail(self, error: QuireError) -> None:
        """The request ends with an error; what was generated before is delivered first."""
        ...

    def release(self) -> None:
        """The request holds no block any more."""
        ...
