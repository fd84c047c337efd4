"""What a front is to hear, gathered until it is sent: one message for all tokens of a step.

While a message is on its way the next one grows. It is bounded by what the front's requests may generate, and holds no
block: a front that is slow, or frozen, costs text as a slow client does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from gateway.core.step import LogprobRow
from gateway.delivery import Answer
from protos.gateway.v1 import engine_pb2 as pb
from protos.gateway.v1 import gateway_pb2
from quire import columns, status
from quire.errors import QuireError

_MOST_TOKENS: Final = 65_536
_MOST_BYTES: Final = 4 * 2**20
"""Of a message, roughly: one event more may follow when it is reached."""


class Outbox:
    """What one front has not been sent yet; written by the engine's loop, taken by the call that sends it."""

    def __init__(self) -> None:
        self.streams: list[int] = []
        self.samples: list[int] = []
        self.tokens: list[int] = []
        self.told: list[pb.ToldToken] = []
        self._admissions: list[pb.StreamEvent] = []
        self._events: list[pb.StreamEvent] = []
        self._turns: list[pb.TurnAnswer] = []
        self._state: pb.EngineState | None = None
        self.news = asyncio.Event()

    def admit(self, event: pb.StreamEvent) -> None:
        """Adds the admission of a request, which goes before its tokens."""
        self._admissions.append(event)
        self.news.set()

    def add(self, event: pb.StreamEvent) -> None:
        """Adds an event, which goes behind all tokens up to now."""
        self._events.append(event)
        self.news.set()

    def answer_turn(self, answer: pb.TurnAnswer) -> None:
        """Adds the answer to the beginning or the end of a turn."""
        self._turns.append(answer)
        self.news.set()

    def tell_state(self, state: pb.EngineState) -> None:
        """Has the engine's state told; a later one replaces it."""
        self._state = state
        self.news.set()

    def take(self) -> list[pb.AttachResponse]:
        """Returns everything as messages, in the order in which they are to be sent, and forgets it."""
        self.news.clear()
        first = pb.AttachResponse(events=self._admissions, turns=self._turns)
        if self._state is not None:
            first.state.CopyFrom(self._state)
        messages = [first]
        for start in range(0, len(self.streams), _MOST_TOKENS):
            end = start + _MOST_TOKENS
            message = messages[-1] if not start else pb.AttachResponse()
            message.streams = columns.pack(self.streams[start:end])
            message.tokens = columns.pack(self.tokens[start:end])
            samples = self.samples[start:end]
            if any(samples):
                message.samples = columns.pack(samples)
            if start:
                messages.append(message)
        size = 0
        for told in self.told:
            size = _make_room(messages, size, told.ByteSize())
            messages[-1].told.append(told)
        for event in self._events:
            size = _make_room(messages, size, event.ByteSize())
            messages[-1].events.append(event)
        self._forget()
        return messages

    def _forget(self) -> None:
        self.streams, self.samples, self.tokens = [], [], []
        self.told, self._admissions, self._events, self._turns = [], [], [], []
        self._state = None


def _make_room(messages: list[pb.AttachResponse], size: int, more: int) -> int:
    """Begins another message if the last one is large; returns the size with what is added next."""
    if size > _MOST_BYTES:
        messages.append(pb.AttachResponse())
        return more
    return size + more


class FrontStream:
    """A request that a front has sent: `gateway.delivery.Delivery` into its outbox.

    Args:
        stream: number of the stream.
        request_id: name of the request.
        outbox: of the front.
        on_release: hears the number of the stream when nothing more will come.
    """

    __slots__ = ("_on_release", "_outbox", "_rows", "_stream", "request_id")

    def __init__(self, stream: int, request_id: str, outbox: Outbox, on_release: Callable[[int], object]) -> None:
        self._stream = stream
        self._on_release = on_release
        self._outbox = outbox
        self._rows: dict[int, LogprobRow] = {}
        self.request_id = request_id

    def admitted(self, event: gateway_pb2.Admitted) -> None:
        """See Delivery."""
        self._outbox.admit(pb.StreamEvent(stream=self._stream, admitted=event))

    def push(self, index: int, token: int, text: str | None = None) -> None:
        """See Delivery."""
        outbox = self._outbox
        if text is None and not self._rows:
            outbox.streams.append(self._stream)
            outbox.samples.append(index)
            outbox.tokens.append(token)
        else:
            told = pb.ToldToken(stream=self._stream, sample=index, token=token, text=text)
            row = self._rows.pop(index, None)
            if row is not None:
                _fill_row(told.logprob, row)
            outbox.told.append(told)
        outbox.news.set()

    def push_logprob(self, index: int, row: LogprobRow) -> None:
        """See Delivery."""
        self._rows[index] = row

    def prompt_logprobs(self, rows: list[LogprobRow]) -> None:
        """See Delivery."""
        event = pb.StreamEvent(stream=self._stream)
        event.prompt.SetInParent()
        for row in rows:
            _fill_row(event.prompt.rows.add(), row)
        self._outbox.admit(event)

    def select(self, indexes: list[int]) -> None:
        """See Delivery."""
        self._outbox.add(pb.StreamEvent(stream=self._stream, selection=pb.Selection(samples=indexes)))

    def answer(self, samples: list[Answer]) -> None:
        """See Delivery."""
        event = pb.StreamEvent(stream=self._stream)
        event.found.SetInParent()
        for tokens, shown_count, ending in samples:
            event.found.completions.add(tokens=columns.pack(tokens), shown_count=shown_count, ending=ending)
        self._outbox.add(event)

    def end(self, index: int, ending: gateway_pb2.Ending, text: str = "") -> None:
        """See Delivery."""
        end = pb.SampleEnd(sample=index, ending=ending, text=text)
        self._outbox.add(pb.StreamEvent(stream=self._stream, end=end))

    def finish(self, usage: gateway_pb2.Usage) -> None:
        """See Delivery."""
        self._outbox.add(pb.StreamEvent(stream=self._stream, finished=gateway_pb2.Finished(usage=usage)))

    def fail(self, error: QuireError) -> None:
        """See Delivery."""
        packed = status.to_status(error).SerializeToString()
        self._outbox.add(pb.StreamEvent(stream=self._stream, status=packed))

    def release(self) -> None:
        """See Delivery."""
        self._outbox.add(pb.StreamEvent(stream=self._stream, released=pb.Released()))
        self._on_release(self._stream)


def _fill_row(message: pb.LogprobRow, row: LogprobRow) -> None:
    message.rank = row.rank
    message.token_ids = columns.pack(row.token_ids)
    message.values = columns.pack_floats(row.values)
