"""What a client puts on the wire and reads from it."""

import math

import pytest

from protos.gateway.v1 import gateway_pb2
from quire.errors import InvalidRequestError
from quire.generation import (
    Admitted,
    Delta,
    Finished,
    FinishReason,
    Message,
    events_from,
    generation_from,
    specification,
)
from quire.transcript import Transcript


def test_what_is_not_said_is_not_sent() -> None:
    """The server's defaults must hold, not ours of another version."""
    spec = specification("hello", None, {})
    assert spec.text == "hello"
    assert not spec.sampling.ListFields()
    assert not spec.stopping.ListFields()
    assert not spec.HasField("scheduling")
    assert len(spec.request_id) == 16


def test_zero_is_said_when_it_is_meant() -> None:
    """temperature=0 is greedy; dropped, it would be the default of 1."""
    spec = specification("hello", None, {"temperature": 0, "seed": 0, "top_k": 0})
    assert spec.sampling.HasField("temperature") and spec.sampling.temperature == 0
    assert spec.sampling.HasField("seed") and spec.sampling.HasField("top_k")


def test_token_ids_are_sent_as_they_are() -> None:
    """A program that tokenises itself must not be tokenised again; an empty list is the server's to refuse."""
    assert list(specification([1, 2, 3], None, {}).token_ids.ids) == [1, 2, 3]
    assert specification([], None, {}).WhichOneof("prompt") == "token_ids"


def test_messages_may_be_dataclasses_or_mappings() -> None:
    """Both are in use: ours, and what people have from other APIs."""
    spec = specification(None, [Message("system", "be brief"), {"role": "user", "content": "hi"}], {})
    assert [(turn.role, turn.content) for turn in spec.chat.messages] == [("system", "be brief"), ("user", "hi")]


@pytest.mark.parametrize("messages", ["hello", [{"role": "user"}], [{"role": "u", "content": "c", "name": "x"}], [3]])
def test_what_is_no_conversation_is_refused(messages: object) -> None:
    """A string taken for a list of messages would be sent letter by letter."""
    with pytest.raises(InvalidRequestError):
        specification(None, messages, {})  # type: ignore[arg-type]


def test_a_lone_stop_string_is_one_stop_string() -> None:
    """stop="END" must not stop at every E."""
    assert list(specification("a", None, {"stop": "END"}).stopping.stop) == ["END"]


def test_a_misspelt_option_is_refused_with_the_right_name() -> None:
    """An option that is dropped in silence changes nothing, and the user wonders why."""
    with pytest.raises(TypeError, match="'max_token' is not an option of a request; did you mean 'max_tokens'"):
        specification("a", None, {"max_token": 3})


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": -1},
        {"max_tokens": 2**32},
        {"max_tokens": "many"},
        {"seed": -1},
        {"temperature": "hot"},
        {"stop": [3]},
        {"stop_token_ids": [-1]},
        {"max_queue_time": math.nan},
    ],
)
def test_what_cannot_be_put_on_the_wire_is_an_invalid_request(options: dict[str, object]) -> None:
    """A user catches QuireError; a bare ValueError of protobuf says nothing of the request."""
    with pytest.raises(InvalidRequestError):
        specification("a", None, options)


def test_a_delta_of_several_samples_becomes_one_event_each() -> None:
    """A consumer of n samples sorts by index, not by message."""
    wire = gateway_pb2.GenerateStreamResponse()
    wire.delta.samples.add(index=0, text="a", token_ids=[1])
    last = wire.delta.samples.add(index=1, text="", token_ids=[2])
    last.ending.reason = gateway_pb2.FINISH_REASON_STOP
    last.ending.token_id = 2
    assert events_from(wire) == [Delta(0, "a", (1,)), Delta(1, "", (2,), FinishReason.STOP, 2)]


def test_an_event_of_a_newer_server_is_passed_over() -> None:
    """An old client must survive a new server."""
    assert events_from(gateway_pb2.GenerateStreamResponse()) == []


def test_a_transcript_folds_to_what_the_unary_call_answers() -> None:
    """Streaming and not streaming must say the same."""
    usage = gateway_pb2.Usage(prompt_token_count=3, completion_token_count=2)
    usage.total_time.FromMilliseconds(1500)
    ending = gateway_pb2.Ending(reason=gateway_pb2.FINISH_REASON_STOP, stop_string="X")
    whole = gateway_pb2.GenerateResponse(request_id="r", usage=usage)
    whole.completions.add(index=0, text="ab", token_ids=[1, 2], ending=ending)
    transcript = Transcript("r")
    stream = [gateway_pb2.GenerateStreamResponse() for _ in range(4)]
    stream[0].admitted.request_id = "r"
    stream[1].delta.samples.add(index=0, text="a", token_ids=[1])
    stream[2].delta.samples.add(index=0, text="b", token_ids=[2], ending=ending)
    stream[3].finished.usage.CopyFrom(usage)
    kinds = []
    for message in stream:
        assert transcript.generation() is None
        for event in events_from(message):
            kinds.append(type(event))
            transcript.add(event)
    assert kinds == [Admitted, Delta, Delta, Finished]
    assert transcript.generation() == generation_from(whole)
    assert generation_from(whole).usage.total_seconds == 1.5


def test_a_constraint_is_said_once_and_a_schema_may_be_a_mapping() -> None:
    """Two constraints would leave it to chance which one is kept."""
    spec = specification("x", None, {"guided_json": {"type": "integer"}})
    assert spec.constraint.json_schema == '{"type": "integer"}'
    assert specification("x", None, {"guided_choice": "yes"}).constraint.choice.texts == ["yes"]
    assert specification("x", None, {"guided_regex": "a+"}).constraint.regex == "a+"
    assert specification("x", None, {}).constraint.WhichOneof("kind") is None
    with pytest.raises(InvalidRequestError, match="found 2 constraints"):
        specification("x", None, {"guided_regex": "a", "guided_json": "{}"})
