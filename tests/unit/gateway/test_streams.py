"""What flows to one client, without a socket."""

from __future__ import annotations

from array import array
import asyncio

import pytest

from gateway.core.request import RequestSettings, SamplingSettings
from gateway.streams import RequestStream
from gateway.tokenize import ModelTokenizer
from protos.gateway.v1 import gateway_pb2 as pb
from quire.errors import NotReadyError
from tests.simulation.oracle_executor import tokenizer_files

# One token for each byte: 0 is "!", 64 is "a".
TOKEN_BYTES = ModelTokenizer(tokenizer_files(), add_bos_token=False).token_bytes


def make_stream(samples: int = 1) -> RequestStream:
    """Returns the stream of a request that nobody runs."""
    settings = RequestSettings("r", "m", array("I", [1]), 8, SamplingSettings(), sample_count=samples)
    return RequestStream(settings, TOKEN_BYTES)


async def test_what_came_while_nobody_read_is_one_message_with_every_token_once() -> None:
    """A slow client would otherwise fall behind for good, or lose tokens."""
    stream = make_stream(samples=2)
    for token in range(5):
        stream.push(0, token)
    stream.push(1, 65)
    (message,) = await stream.take()
    assert [(s.index, s.text, list(s.token_ids)) for s in message.delta.samples] == [
        (0, '!"#$%', [0, 1, 2, 3, 4]),
        (1, "b", [65]),
    ]
    stream.push(0, 5, "")
    (message,) = await stream.take()
    assert [(s.index, list(s.token_ids)) for s in message.delta.samples] == [(0, [5])]


async def test_a_reader_that_waits_is_woken_by_a_token() -> None:
    """Otherwise text stays behind until the request ends."""
    stream = make_stream()
    reading = asyncio.create_task(stream.take())
    await asyncio.sleep(0)
    assert not reading.done()
    stream.push(0, 64)
    (message,) = await reading
    assert message.delta.samples[0].text == "a"


async def test_the_end_comes_behind_the_last_token_and_nothing_behind_the_end() -> None:
    """A client must be able to rely on `finished` being the last message."""
    stream = make_stream()
    stream.push(0, 64)
    stream.end(0, pb.Ending(reason=pb.FINISH_REASON_LENGTH))
    stream.finish(pb.Usage(completion_token_count=1))
    delta, finished = await stream.take()
    assert delta.delta.samples[0].ending.reason == pb.FINISH_REASON_LENGTH
    assert finished.finished.usage.completion_token_count == 1
    assert await stream.take() == []


async def test_what_was_generated_before_an_error_is_delivered_before_it() -> None:
    """Tokens that were paid for would otherwise be lost with the request."""
    stream = make_stream()
    stream.push(0, 64)
    stream.fail(NotReadyError("gone"))
    (message,) = await stream.take()
    assert message.delta.samples[0].text == "a"
    with pytest.raises(NotReadyError):
        await stream.take()
