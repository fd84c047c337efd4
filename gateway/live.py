"""A live request, as the engine keeps it."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import TYPE_CHECKING

from gateway.beams import Beams
from gateway.detokenize import Detokenizer

if TYPE_CHECKING:
    from gateway.core.queue import WaitingQueue
    from gateway.core.request import Request
    from gateway.core.step import LogprobRow
    from gateway.delivery import Delivery
    from gateway.models import ServedModel
    from quire.errors import QuireError


@dataclasses.dataclass(slots=True)
class ModelRequests:
    """A model and the requests that wait for it."""

    served: ServedModel
    queue: WaitingQueue


class LiveRequest:
    """A request that has not ended, or whose blocks are not back: where it is delivered, and its timers.

    Args:
        request: what is run.
        delivery: hears what comes of it.
        model: whose request it is.
    """

    __slots__ = (
        "beams",
        "delivery",
        "detokenizers",
        "error",
        "finished",
        "limit_timer",
        "model",
        "prompt_rows",
        "released",
        "request",
        "stop_tokens",
        "stops_late",
        "timer",
    )

    def __init__(self, request: Request, delivery: Delivery, model: ModelRequests) -> None:
        settings = request.settings
        self.request = request
        self.delivery = delivery
        self.model = model
        token_bytes = model.served.tokenizer.token_bytes
        # Text decides where there are stop strings, and nowhere else.
        self.detokenizers = [Detokenizer(token_bytes, settings.stop) for _ in request.samples] if settings.stop else []
        self.stop_tokens = settings.eos_token_ids | settings.stop_token_ids
        """Tokens that may end a sample."""
        self.stops_late = settings.min_tokens > 0
        """Whether no sample may end before some tokens."""
        self.timer: asyncio.TimerHandle | None = None
        """Of its stay in the queue."""
        self.limit_timer: asyncio.TimerHandle | None = None
        """Of its time limit."""
        self.prompt_rows: list[LogprobRow] = []
        """Log-probabilities of the prompt, as far as they are known."""
        self.beams = Beams(request) if settings.beam is not None else None
        self.error: QuireError | None = None
        self.finished = False
        """Whether its end was delivered."""
        self.released = asyncio.Event()
        """Set once it holds no block any more."""

    def held_text(self, index: int) -> str:
        """Returns, once, the text of a sample that was held back: it might have become a stop string."""
        return self.detokenizers[index].flush() if self.detokenizers else ""

    def fail(self, error: QuireError) -> None:
        """Delivers an error, unless the end was delivered before."""
        if self.error is None and not self.finished:
            self.error = error
            self.delivery.fail(error)

    @property
    def outcome(self) -> str:
        """How the request ended, for the log: "finished", "cancelled" or the reason of its error."""
        if self.error is not None:
            return self.error.reason
        return "cancelled" if self.request.cancelled else "finished"

    def cancel_timers(self) -> None:
        """Stops both timers."""
        for timer in (self.timer, self.limit_timer):
            if timer is not None:
                timer.cancel()
