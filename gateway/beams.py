"""Beam search on forked tables: the beams of one request from step to step.

Each beam is a sequence that is held after every token. When all of them have one, the search says which continuations
go on. The likeliest of a beam is what the executor has sampled: that sequence goes on as it is. Each other one is a new
sequence whose table is forked, with no copy; a beam of which nothing goes on ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.core.beam import BeamSearch
from gateway.core.sequence import Sequence, SequenceState
from gateway.delivery import Answer
from protos.gateway.v1 import gateway_pb2 as pb

if TYPE_CHECKING:
    from gateway.core.request import Request
    from gateway.core.step import LogprobRow
    from gateway.delivery import Delivery


class Beams:
    """The beams of one request.

    Args:
        request: with beam settings, and one sample.
    """

    def __init__(self, request: Request) -> None:
        settings = request.settings
        assert settings.beam is not None
        self._request = request
        limit = request.samples[0].length_limit - len(settings.prompt)
        self._search = BeamSearch(settings.beam, settings.eos_token_ids, limit)
        self._running = list(request.samples)
        self._rows: dict[Sequence, LogprobRow] = {}
        self.forks: list[tuple[Sequence, list[Sequence]]] = []
        """Sequences whose tables are to be forked, with those that begin then; whoever does it clears them."""
        self.resumed: list[Sequence] = []
        """Sequences that may go on by a token; whoever tells their queue clears them."""
        self.dropped: list[Sequence] = []
        """Sequences that go on no more; whoever ends them clears them."""

    @property
    def done(self) -> bool:
        """Whether the search has ended."""
        return self._search.done

    def note(self, sequence: Sequence, row: LogprobRow) -> None:
        """Keeps what may follow a beam."""
        self._rows[sequence] = row

    def advance(self) -> bool:
        """Decides what goes on once all beams have a token; returns whether it did."""
        if len(self._rows) < len(self._running):
            return False
        rows = [self._rows[beam] for beam in self._running]
        self._rows.clear()
        going = self._search.advance([list(zip(row.token_ids[1:], row.values[1:], strict=True)) for row in rows])
        new: dict[int, list[Sequence]] = {}
        kept: set[int] = set()
        running = []
        for place, token in going:
            beam = self._running[place]
            if token == beam.tokens[-1]:
                kept.add(place)
                running.append(beam)
            else:
                running.append(self._branch(beam, token))
                new.setdefault(place, []).append(running[-1])
        for place, beam in enumerate(self._running):
            if place in new:
                self.forks.append((beam, new[place]))
            elif place in kept:
                beam.hold()
                self.resumed.append(beam)
            if place not in kept:
                self.dropped.append(beam)
        self._running = running
        return True

    def _branch(self, beam: Sequence, token: int) -> Sequence:
        """Returns a new sequence with the tokens of a beam, but another last one."""
        request = self._request
        sequence = Sequence(request, request.samples[-1].index + 1, request.settings.prompt, beam.length_limit)
        sequence.tokens = beam.tokens[:-1]
        sequence.tokens.append(token)
        sequence.stepwise = True
        sequence.state = SequenceState.WAITING
        sequence.clear_table()
        sequence.hold()
        request.samples.append(sequence)
        return sequence

    def answer(self, delivery: Delivery) -> None:
        """Has the best hypotheses delivered; before the end those that are best so far."""
        settings = self._request.settings
        found = self._search.best(settings.answer_count)
        cut = pb.FINISH_REASON_CANCELLED if self._request.cancelled else pb.FINISH_REASON_TIME_LIMIT
        samples = []
        for hypothesis in found:
            ended = bool(hypothesis.tokens) and hypothesis.tokens[-1] in settings.eos_token_ids
            reason = pb.FINISH_REASON_EOS if ended else pb.FINISH_REASON_LENGTH if self.done else cut
            tokens = list(hypothesis.tokens)
            samples.append(Answer(tokens, len(tokens) - ended, pb.Ending(reason=reason)))
        self._request.answered_token_count = sum(len(sample.tokens) for sample in samples)
        delivery.answer(samples)
