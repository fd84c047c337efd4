"""What is checked at a front is what the engine runs."""

from __future__ import annotations

from array import array
import dataclasses
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gateway.core.beam import BeamSettings
from gateway.core.request import RequestSettings, SamplingSettings
from gateway.core.session import Message, Session, TurnEnd
from gateway.fronts.requests import from_content, from_model, from_submit, to_content, to_model, to_submit
from gateway.models import ServedModel
from gateway.tokenize import ModelTokenizer
from protos.gateway.v1 import engine_pb2 as pb
from protos.gateway.v1 import gateway_pb2
from tests.simulation.oracle_executor import tokenizer_files

TOKENS = st.integers(0, 2**32 - 1)
COUNTS = st.integers(0, 2**31)
TEXT = st.text(max_size=20)
# As clients send them: of 32 bits.
FLOATS = st.floats(-100, 100, width=32)
SECONDS = st.floats(0, 1e6)


def built(cls: type, **strategies: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Returns instances of a dataclass; a field that is new and forgotten here is an error."""
    assert set(strategies) == {field.name for field in dataclasses.fields(cls)}
    return st.builds(cls, **strategies)


SAMPLING = built(
    SamplingSettings,
    temperature=FLOATS,
    top_k=COUNTS,
    top_p=FLOATS,
    min_p=FLOATS,
    seed=st.integers(0, 2**64 - 1),
    typical_p=FLOATS,
    repetition_penalty=FLOATS,
    presence_penalty=FLOATS,
    frequency_penalty=FLOATS,
    logit_bias=st.dictionaries(TOKENS, FLOATS, max_size=4).map(lambda bias: tuple(sorted(bias.items()))),
)
SETTINGS = built(
    RequestSettings,
    request_id=TEXT,
    model=TEXT,
    prompt=st.lists(TOKENS, max_size=20).map(lambda tokens: array("I", tokens)),
    max_tokens=COUNTS,
    sampling=SAMPLING,
    sample_count=COUNTS,
    answer_count=COUNTS,
    min_tokens=COUNTS,
    stop=st.lists(TEXT, max_size=3).map(tuple),
    stop_token_ids=st.frozensets(TOKENS, max_size=3),
    include_stop_str=st.booleans(),
    eos_token_ids=st.frozensets(TOKENS, max_size=3),
    tenant=TEXT,
    cache_salt=TEXT,
    skip_cache_read=st.booleans(),
    skip_cache_write=st.booleans(),
    max_queue_time=SECONDS,
    time_limit=SECONDS,
    priority=st.integers(-(2**31), 2**31 - 1),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
    echo=st.booleans(),
    grammar=TEXT,
    beam=st.none() | built(BeamSettings, width=COUNTS, length_penalty=FLOATS, early_stopping=st.booleans()),
    session_id=TEXT,
    retention_ttl=COUNTS,
)


@given(SETTINGS, st.integers(1, 2**32 - 1))
def test_a_request_arrives_as_it_was_checked(settings: RequestSettings, stream: int) -> None:
    """A field that is lost on the way is an option that works with one process only."""
    submit = pb.Submit.FromString(to_submit(stream, settings).SerializeToString())
    assert submit.stream == stream
    assert from_submit(submit) == settings


@given(
    st.builds(
        Session,
        session_id=TEXT,
        model=TEXT,
        ttl=SECONDS,
        expires_at=st.just(0.0),
        tokens=st.lists(TOKENS, max_size=9).map(lambda tokens: array("I", tokens)),
        turns=st.lists(st.builds(TurnEnd, COUNTS, COUNTS, COUNTS), max_size=3),
        messages=st.lists(st.builds(Message, TEXT, TEXT), max_size=3),
        text=TEXT,
    )
)
def test_a_session_arrives_as_it_is(session: Session) -> None:
    """What a front adds to a conversation begins with what was said through others."""
    content = pb.SessionContent.FromString(to_content(session).SerializeToString())
    assert from_content(content) == session


def test_a_model_arrives_as_it_is_served() -> None:
    """Fronts check requests against it."""
    tokenizer = ModelTokenizer(tokenizer_files(), add_bos_token=True)
    sampling = gateway_pb2.Sampling(temperature=0.5, top_k=20)
    model = ServedModel("m", "Llama", 256, 4096, 9000, frozenset({3, 1}), tokenizer, ("a", "b"), sampling, 99)
    # One that is new, and forgotten here, has its default.
    for field in dataclasses.fields(ServedModel):
        assert getattr(model, field.name) not in (field.default, 0, "")
    message = to_model(model)
    assert from_model(message, tokenizer) == model
    assert (message.tokenizer_sha256, message.add_bos_token) == (tokenizer_files().sha256, True)
