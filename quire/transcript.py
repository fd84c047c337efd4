"""The events of one stream, put together again."""

import dataclasses

from quire.generation import (
    Admitted,
    Completion,
    Delta,
    Event,
    Finished,
    FinishReason,
    Generation,
    PromptLogprobs,
    Usage,
)
from quire.logprobs import TokenLogprob


@dataclasses.dataclass(slots=True)
class _Sample:
    """What was said of one sample."""

    texts: list[str] = dataclasses.field(default_factory=list)
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    ending: tuple[FinishReason, str | int | None] | None = None


class Transcript:
    """Puts the events of one stream together again."""

    def __init__(self, request_id: str) -> None:
        """Starts with nothing said."""
        self.request_id = request_id
        self.admitted: Admitted | None = None
        self.usage: Usage | None = None
        self._prompt: tuple[TokenLogprob, ...] = ()
        self._samples: dict[int, _Sample] = {}

    def add(self, event: Event) -> None:
        """Notes one event."""
        if isinstance(event, Admitted):
            self.admitted = event
        elif isinstance(event, Finished):
            self.usage = event.usage
        elif isinstance(event, PromptLogprobs):
            self._prompt = event.tokens
        else:
            self._add_delta(event)

    def _add_delta(self, event: Delta) -> None:
        sample = self._samples.setdefault(event.index, _Sample())
        sample.texts.append(event.text)
        sample.token_ids.extend(event.token_ids)
        sample.logprobs.extend(event.logprobs)
        if event.finish_reason is not None:
            sample.ending = (event.finish_reason, event.stop)

    def generation(self) -> Generation | None:
        """Returns the whole answer, or None while the stream has not finished."""
        if self.usage is None:
            return None
        completions = [
            Completion(
                index, "".join(sample.texts), tuple(sample.token_ids), *sample.ending, logprobs=tuple(sample.logprobs)
            )
            for index, sample in sorted(self._samples.items())
            if sample.ending is not None
        ]
        return Generation(self.request_id, tuple(completions), self.usage, self._prompt)
