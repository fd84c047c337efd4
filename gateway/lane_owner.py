"""What a lane tells whoever owns the requests that it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from protos.execsvc.v1 import execsvc_pb2 as pb
from quire.errors import QuireError
from quire.memory import PoolInfo

if TYPE_CHECKING:
    from gateway.clients.executor import ExecutorLink
    from gateway.core.queue import WaitingQueue
    from gateway.core.sequence import Sequence
    from gateway.core.step import LogprobRow


class LaneOwner(Protocol):
    """What a lane tells."""

    async def model_queue(self, link: ExecutorLink, description: pb.DescribeResponse, pool: PoolInfo) -> WaitingQueue:
        """The executor is open: returns the queue of its model."""
        ...

    def session_ended(self, pool_id: str) -> None:
        """The executor is not open any more."""
        ...

    def fatal(self, reason: str) -> None:
        """A defect: the process must stop."""
        ...

    def admitted(self, sequence: Sequence) -> None:
        """A sequence has left the queue."""
        ...

    def logprobs(self, sequence: Sequence, row: LogprobRow) -> None:
        """Log-probabilities of a token of a sequence's prompt, or of the token that `token` tells of next."""
        ...

    def token(self, sequence: Sequence, token: int) -> bool:
        """A sequence has a new token; returns whether that ends it."""
        ...

    def take_forks(self) -> list[tuple[Sequence, list[Sequence]]]:
        """Returns, once, what is to be forked besides: held sequences, with those that begin on their blocks."""
        ...

    def released(self, sequence: Sequence) -> None:
        """A sequence that has ended holds nothing any more."""
        ...

    def failed(self, sequence: Sequence, error: QuireError) -> None:
        """A sequence cannot go on; its request fails."""
        ...
