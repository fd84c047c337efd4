"""What commands print for people and for programs."""

import json

from google.protobuf import duration_pb2
import pytest

from protos.memsvc.v1 import admin_pb2, memsvc_pb2
from quire.cli.output import format_seconds, plain, print_error, print_json
from quire.generation import Completion, FinishReason, Generation, Usage


def test_a_message_becomes_plain_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Programs want numbers as numbers, states by name, times in seconds, and zeros that are there."""
    pool = admin_pb2.Pool(pool_id="p", state=memsvc_pb2.POOL_STATE_READY, used_token_count=2**40)
    pool.spec.block_count = 9
    print_json([pool])
    (found,) = json.loads(capsys.readouterr().out)
    assert found["state"] == "ready"
    assert found["used_token_count"] == 2**40
    assert found["free_block_count"] == 0
    assert found["spec"]["block_count"] == 9


def test_identities_are_hexadecimal_and_durations_are_seconds() -> None:
    """Base64 and "1.5s" would need decoding by every script."""
    block = admin_pb2.GetBlockResponse(identity=b"\x01\xff", since=duration_pb2.Duration(seconds=1, nanos=500_000_000))
    found = plain(block)
    assert (found["identity"], found["since"]) == ("01ff", 1.5)
    assert "since" not in plain(admin_pb2.GetBlockResponse())


def test_an_answer_becomes_plain_json() -> None:
    """`quire generate --json` is read by jq."""
    usage = Usage(1, 0, 2, 0, 1, 0.0, 0.1, 0.2)
    found = plain(Generation("r", (Completion(0, "hi", (1, 2), FinishReason.EOS),), usage))
    assert found["completions"][0]["finish_reason"] == "eos"
    assert found["completions"][0]["token_ids"] == [1, 2]
    assert found["usage"]["total_seconds"] == 0.2


def test_an_error_is_one_line_on_stderr_whatever_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    """Scripts take the first line; markup in a message must not be interpreted or swallowed."""
    print_error("bad\nvalue [bold]x[/bold] [/]", "do this")
    printed = capsys.readouterr()
    assert printed.err == "error: bad value [bold]x[/bold] [/]\nhint: do this\n"
    assert printed.out == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.25, "0.2 s"), (59.9, "59.9 s"), (200, "3 min 20 s")])
def test_times_are_readable(seconds: float, text: str) -> None:
    """Nobody divides by sixty in the head."""
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    assert format_seconds(duration) == text
