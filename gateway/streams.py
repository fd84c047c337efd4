"""What flows to one client: deltas merge while nobody reads, so a slow reader costs text, never keys and values.

Generation never waits for delivery. What is buffered is bounded by the tokens that the request may generate.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from protos.gateway.v1 import gateway_pb2 as pb
from quire.errors import QuireError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gateway.core.request import Request


class _News:
    """What one sample has that was not delivered yet."""

    __slots__ = ("ending", "logprobs", "texts", "tokens")

    def __init__(self) -> None:
        self.logprobs: list[pb.TokenLogprob] = []
        self.texts: list[str] = []
        self.tokens: list[int] = []
        self.ending: pb.Ending | None = None


class RequestStream:
    """The events of one request, from the step loop to one reader."""

    __slots__ = (
        "_admitted",
        "_delivered",
        "_error",
        "_has_news",
        "_news",
        "_prompt",
        "_released",
        "_selects",
        "_usage",
        "_waiter",
        "request",
    )

    def __init__(self, request: Request) -> None:
        """Starts with nothing to say."""
        self.request = request
        self._admitted: pb.Admitted | None = None
        self._prompt: pb.PromptLogprobs | None = None
        # While it does, what the samples have is kept until the best are known.
        self._selects = request.settings.selects
        self._news: dict[int, _News] = {}
        self._usage: pb.Usage | None = None
        self._error: QuireError | None = None
        self._delivered = False
        # A future for each wait of the one reader; an event would cost twice as much for each message.
        self._has_news = False
        self._waiter: asyncio.Future[None] | None = None
        self._released = asyncio.Event()

    def _wake(self) -> None:
        """Wakes the reader, if it waits."""
        self._has_news = True
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def admitted(self, event: pb.Admitted) -> None:
        """The request has left the queue."""
        self._admitted = event
        self._wake()

    def push(self, index: int, text: str, token: int) -> None:
        """A sample has a new token, and perhaps text."""
        news = self._news.get(index)
        if news is None:
            self._news[index] = news = _News()
        news.tokens.append(token)
        if text:
            news.texts.append(text)
        if not self._has_news:
            self._wake()

    def begin(self, text: str) -> None:
        """The text of every sample begins with this; their first tokens follow."""
        for index in range(len(self.request.samples)):
            self._news.setdefault(index, _News()).texts.append(text)

    def push_logprob(self, index: int, logprob: pb.TokenLogprob) -> None:
        """The token of a sample that is pushed next has log-probabilities."""
        self._news.setdefault(index, _News()).logprobs.append(logprob)

    def prompt_logprobs(self, logprobs: pb.PromptLogprobs) -> None:
        """The prompt has log-probabilities."""
        self._prompt = logprobs
        self._wake()

    def select(self, indexes: list[int]) -> None:
        """Lets the samples of these indexes be answered, in this order, and no others."""
        news, self._selects = self._news, False
        self._news = {place: news[index] for place, index in enumerate(indexes) if index in news}

    def answer(self, samples: list[tuple[str, list[int], pb.Ending]]) -> None:
        """Answers these samples (text, tokens, ending), and nothing of what was pushed."""
        self._news, self._selects = {}, False
        for index, (text, tokens, ending) in enumerate(samples):
            news = self._news[index] = _News()
            news.tokens = tokens
            news.texts = [text]
            news.ending = ending

    def end(self, index: int, ending: pb.Ending, text: str = "") -> None:
        """A sample has its last token; `text` was held back until then."""
        news = self._news.setdefault(index, _News())
        news.ending = ending
        if text:
            news.texts.append(text)
        self._wake()

    def finish(self, usage: pb.Usage) -> None:
        """Every sample has ended; the first figures stand."""
        if self._usage is None:
            self._usage = usage
            self._wake()

    def fail(self, error: QuireError) -> None:
        """The request ends with an error; what was generated before is delivered first."""
        if self._error is None and self._usage is None:
            self._error = error
            self._wake()

    @property
    def finished(self) -> bool:
        """Whether the end is there, delivered or not."""
        return self._usage is not None

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

    def _take_delta(self) -> pb.GenerateStreamResponse:
        """Returns everything new and forgets it."""
        response = pb.GenerateStreamResponse()
        samples = response.delta.samples
        news, self._news = self._news, {}
        for index in sorted(news) if len(news) > 1 else news:
            new = news[index]
            sample = samples.add()
            if index:
                sample.index = index
            sample.text = new.texts[0] if len(new.texts) == 1 else "".join(new.texts)
            sample.token_ids.extend(new.tokens)
            if new.logprobs:
                sample.logprobs.extend(new.logprobs)
            if new.ending is not None:
                sample.ending.CopyFrom(new.ending)
        return response

    async def take(self) -> list[pb.GenerateStreamResponse]:
        """Waits for news and returns them as messages: admitted, delta, finished. Nothing after the end.

        Raises:
            QuireError: the request failed.
        """
        if self._delivered:
            return []
        messages: list[pb.GenerateStreamResponse] = []
        while not messages:
            if not self._has_news:
                # No deadline of its own: the call's deadline cancels the reader, and every request ends.
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
            self._has_news = False
            if self._admitted is not None:
                admitted, self._admitted = self._admitted, None
                messages.append(pb.GenerateStreamResponse(admitted=admitted))
            if self._prompt is not None:
                prompt, self._prompt = self._prompt, None
                messages.append(pb.GenerateStreamResponse(prompt_logprobs=prompt))
            if self._news and not self._selects:
                messages.append(self._take_delta())
            if self._error is not None:
                if not messages:
                    raise self._error
                self._has_news = True
            elif self._usage is not None:
                messages.append(pb.GenerateStreamResponse(finished=pb.Finished(usage=self._usage)))
                self._delivered = True
        return messages

    async def events(self) -> AsyncIterator[pb.GenerateStreamResponse]:
        """Yields the messages one by one; raises as `take`."""
        while messages := await self.take():
            for message in messages:
                yield message
