"""What flows to one client: deltas merge while nobody reads, so a slow reader costs text, never keys and values.

Generation never waits for delivery. What is buffered is bounded by the tokens that the request may generate.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from protos.gateway.v1 import gateway_pb2 as pb
from quire.errors import QuireError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from gateway.core.request import Request


class RequestStream:
    """The events of one request, from the step loop to one reader."""

    def __init__(self, request: Request) -> None:
        """Starts with nothing to say."""
        self.request = request
        self._admitted: pb.Admitted | None = None
        self._texts: dict[int, list[str]] = {}
        self._tokens: dict[int, list[int]] = {}
        self._endings: dict[int, pb.Ending] = {}
        self._usage: pb.Usage | None = None
        self._error: QuireError | None = None
        self._changed = asyncio.Event()
        self._released = asyncio.Event()

    def admitted(self, event: pb.Admitted) -> None:
        """The request has left the queue."""
        self._admitted = event
        self._changed.set()

    def push(self, index: int, text: str, tokens: Sequence[int]) -> None:
        """A sample has new tokens, and perhaps text."""
        self._tokens.setdefault(index, []).extend(tokens)
        if text:
            self._texts.setdefault(index, []).append(text)
        self._changed.set()

    def end(self, index: int, ending: pb.Ending) -> None:
        """A sample has its last token."""
        self._endings[index] = ending
        self._changed.set()

    def finish(self, usage: pb.Usage) -> None:
        """Every sample has ended; the first figures stand."""
        if self._usage is None:
            self._usage = usage
            self._changed.set()

    def fail(self, error: QuireError) -> None:
        """The request ends with an error; what was generated before is delivered first."""
        if self._error is None and self._usage is None:
            self._error = error
            self._changed.set()

    @property
    def outcome(self) -> str:
        """How the request ended, for the log: "finished", "cancelled" or the reason of its error."""
        if self._error is not None:
            return self._error.reason
        return "cancelled" if self.request.cancelled else "finished"

    def release(self) -> None:
        """The request holds no block any more."""
        self._released.set()

    async def wait_released(self) -> None:
        """Waits until the request holds no block any more."""
        await self._released.wait()

    def _take_delta(self) -> pb.Delta:
        """Returns everything new and forgets it."""
        delta = pb.Delta()
        for index in sorted(self._tokens.keys() | self._texts.keys() | self._endings.keys()):
            sample = delta.samples.add(index=index, text="".join(self._texts.get(index, ())))
            sample.token_ids.extend(self._tokens.get(index, ()))
            if index in self._endings:
                sample.ending.CopyFrom(self._endings[index])
        self._texts, self._tokens, self._endings = {}, {}, {}
        return delta

    async def events(self) -> AsyncIterator[pb.GenerateStreamResponse]:
        """Yields the events: admitted, deltas, finished.

        Raises:
            QuireError: the request failed.
        """
        while True:
            # No deadline of its own: the call's deadline cancels the reader, and every request ends.
            await self._changed.wait()
            self._changed.clear()
            if self._admitted is not None:
                admitted, self._admitted = self._admitted, None
                yield pb.GenerateStreamResponse(admitted=admitted)
            delta = self._take_delta()
            if delta.samples:
                yield pb.GenerateStreamResponse(delta=delta)
            if self._error is not None:
                raise self._error
            if self._usage is not None and not self._changed.is_set():
                yield pb.GenerateStreamResponse(finished=pb.Finished(usage=self._usage))
                return
