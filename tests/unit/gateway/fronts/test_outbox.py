"""What a front hears is in order, complete, and in messages of a bounded size."""

from __future__ import annotations

import pytest

from gateway.core.step import LogprobRow
from gateway.fronts import outbox as module
from gateway.fronts.outbox import FrontStream, Outbox
from protos.gateway.v1 import engine_pb2 as pb
from protos.gateway.v1 import gateway_pb2
from quire import columns


def rows(message: pb.AttachResponse) -> list[tuple[int, int, int]]:
    """Returns (stream, sample, token) of the columns of a message."""
    streams = columns.unpack_list(message.streams, "streams")
    samples = columns.unpack_list(message.samples, "samples") or [0] * len(streams)
    return list(zip(streams, samples, columns.unpack_list(message.tokens, "tokens"), strict=True))


def test_the_tokens_of_a_step_are_columns_of_one_message() -> None:
    """A message for each stream would cost the engine what the fronts are there to take from it."""
    outbox = Outbox()
    streams = [FrontStream(number, f"r{number}", outbox, print) for number in range(1, 257)]
    for stream in streams:
        stream.push(0, 7)
    (message,) = outbox.take()
    assert rows(message) == [(number, 0, 7) for number in range(1, 257)]
    assert not message.samples
    assert not (message.told or message.events)
    streams[4].push(2, 8)
    (message,) = outbox.take()
    assert rows(message) == [(5, 2, 8)]


def test_an_admission_goes_first_and_an_end_last_however_much_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A front delivers what it hears at once: a token before its admission would reach the client so."""
    monkeypatch.setattr(module, "_MOST_TOKENS", 10)
    monkeypatch.setattr(module, "_MOST_BYTES", 40)
    outbox = Outbox()
    released: list[int] = []
    stream = FrontStream(1, "r", outbox, released.append)
    for token in range(25):
        stream.push(0, token)
    stream.admitted(gateway_pb2.Admitted(request_id="r"))
    for token in range(25, 35):
        stream.push(0, token, "a text of some characters")
    stream.end(0, gateway_pb2.Ending(reason=gateway_pb2.FINISH_REASON_LENGTH))
    stream.finish(gateway_pb2.Usage(completion_token_count=35))
    stream.release()
    messages = outbox.take()
    assert released == [1]
    assert messages[0].events[0].WhichOneof("event") == "admitted"
    tokens = [token for message in messages for _, _, token in rows(message)]
    tokens += [told.token for message in messages for told in message.told]
    assert tokens == list(range(35))
    assert max(len(rows(message)) for message in messages) == 10
    assert max(len(message.told) for message in messages) == 2
    events = [event.WhichOneof("event") for message in messages for event in message.events]
    assert events == ["admitted", "end", "finished", "released"]
    assert [message.WhichOneof("event") for message in messages[-1].events][-1] == "released"
    (empty,) = outbox.take()
    assert not empty.ByteSize()


def test_log_probabilities_travel_with_their_token() -> None:
    """A client is promised them beside the token, in one message."""
    outbox = Outbox()
    stream = FrontStream(1, "r", outbox, print)
    stream.push_logprob(1, LogprobRow(9, 9, 2, [5, 6], [-0.5, -1.5]))
    stream.push(1, 5)
    stream.push(0, 6)
    (message,) = outbox.take()
    (told,) = message.told
    assert (told.stream, told.sample, told.token, told.HasField("text")) == (1, 1, 5, False)
    assert (told.logprob.rank, columns.unpack_floats(told.logprob.values, "values")) == (2, [-0.5, -1.5])
    assert rows(message) == [(1, 0, 6)]


def test_the_last_state_replaces_those_before() -> None:
    """A front that was slow must not learn yesterday's models."""
    outbox = Outbox()
    outbox.tell_state(pb.EngineState(ready=False))
    outbox.tell_state(pb.EngineState(ready=True))
    (message,) = outbox.take()
    assert message.state.ready
