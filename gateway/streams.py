"""What flows to one client: deltas merge while nobody reads, so a slow reader costs text, never keys and values.

Generation never waits for delivery. What is buffered is bounded by the tokens that the request may generate. Text is
made when it is read, of all tokens that came meanwhile at once.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from gateway.outputs import token_logprob
from protos.gateway.v1 import gateway_pb2 as pb
from quire.errors import QuireError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from gateway.core.request import RequestSettings
    from gateway.core.step import LogprobRow
    from gateway.delivery import Answer
    from gateway.detokenize import TokenBytes


class _News:
    """What one sample has that was not delivered yet."""

    __slots__ = ("ending", "logprobs", "plain", "texts", "tokens")

    def __init__(self) -> None:
        self.logprobs: list[LogprobRow] = []
        self.texts: list[str] = []
        self.tokens: list[int] = []
        # Tokens whose text is still to be made; it follows `texts`.
        self.plain: list[int] = []
        self.ending: pb.Ending | None = None


class RequestStream:
    """The events of one request, from the step loop to one reader: a `gateway.delivery.Delivery`."""

    __slots__ = (
        "_admitted",
        "_decoders",
        "_delivered",
        "_echo",
        "_error",
        "_has_news",
        "_news",
        "_prompt",
        "_released",
        "_selects",
        "_token_bytes",
        "_usage",
        "_waiter",
        "settings",
    )

    def __init__(self, settings: RequestSettings, token_bytes: TokenBytes) -> None:
        """Starts with nothing to say.

        Args:
            settings: the request.
            token_bytes: what tokens spell.
        """
        self.settings = settings
        self._token_bytes = token_bytes
        self._decoders: dict[int, Callable[[Sequence[int]], str]] = {}
        self._echo = settings.echo
        self._admitted: pb.Admitted | None = None
        self._prompt: list[LogprobRow] | None = None
        # While it does, what the samples have is kept until the best are known.
        self._selects = settings.selects
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
        """See Delivery."""
        self._admitted = event
        self._wake()

    def push(self, index: int, token: int, text: str | None = None) -> None:
        """See Delivery."""
        if self._echo:
            self._begin()
        news = self._news.get(index)
        if news is None:
            self._news[index] = news = _News()
        news.tokens.append(token)
        if text is None:
            news.plain.append(token)
        elif text:
            news.texts.append(text)
        if not self._has_news:
            self._wake()

    def _begin(self) -> None:
        """The text of every sample begins with that of the prompt; their first tokens follow."""
        self._echo = False
        text = self._token_bytes.text(self.settings.prompt)
        for index in range(self.settings.sample_count):
            self._news.setdefault(index, _News()).texts.append(text)

    def push_logprob(self, index: int, row: LogprobRow) -> None:
        """See Delivery."""
        self._news.setdefault(index, _News()).logprobs.append(row)

    def prompt_logprobs(self, rows: list[LogprobRow]) -> None:
        """See Delivery."""
        self._prompt = rows
        self._wake()

    def select(self, indexes: list[int]) -> None:
        """See Delivery."""
        news, self._selects = self._news, False
        self._news = {place: news[index] for place, index in enumerate(indexes) if index in news}

    def answer(self, samples: list[Answer]) -> None:
        """See Delivery."""
        self._news, self._selects = {}, False
        for index, (tokens, shown_count, ending) in enumerate(samples):
            news = self._news[index] = _News()
            news.tokens = tokens
            news.texts = [self._token_bytes.text(tokens[:shown_count])]
            news.ending = ending

    def end(self, index: int, ending: pb.Ending, text: str = "") -> None:
        """See Delivery."""
        news = self._news.setdefault(index, _News())
        news.ending = ending
        if text:
            news.texts.append(text)
        self._wake()

    def finish(self, usage: pb.Usage) -> None:
        """See Delivery; the first figures stand."""
        if self._usage is None:
            self._usage = usage
            self._wake()

    def fail(self, error: QuireError) -> None:
        """See Delivery; the first end stands."""
        if self._error is None and self._usage is None:
            self._error = error
            self._wake()

    @property
    def finished(self) -> bool:
        """Whether the end is there, delivered or not."""
        return self._usage is not None or self._error is not None

    def release(self) -> None:
        """See Delivery."""
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
            if new.plain:
                decoder = self._decoders.get(index)
                if decoder is None:
                    self._decoders[index] = decoder = self._token_bytes.decoder()
                new.texts.append(decoder(new.plain))
            sample.text = new.texts[0] if len(new.texts) == 1 else "".join(new.texts)
            sample.token_ids.extend(new.tokens)
            if new.logprobs:
                count = self.settings.logprobs or 0
                sample.logprobs.extend(token_logprob(row, count, self._token_bytes) for row in new.logprobs)
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
                rows, self._prompt = self._prompt, None
                count = self.settings.prompt_logprobs or 0
                tokens = [token_logprob(row, count, self._token_bytes) for row in rows]
                messages.append(pb.GenerateStreamResponse(prompt_logprobs=pb.PromptLogprobs(tokens=tokens)))
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
