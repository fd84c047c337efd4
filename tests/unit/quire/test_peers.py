"""Peers are asked for the same work as ours, and one that fails is an error and no figure."""

from __future__ import annotations

from pathlib import Path
import sys

import pytest

from execsvc.bench.compare import compare
from execsvc.bench.report import Request
from execsvc.config import ExecsvcConfig
from quire.errors import ConfigError, QuireError
from quire.peers import process
from quire.peers.process import ALONE, Peer, PeerChoice, choices
from tests.unit.execsvc import tiny

_ECHO = """
import json, sys
sys.path.insert(0, {folder!r})
from serving import run, take_standard_output

class Echo:
    def __init__(self, arguments):
        self.about = {{"version": "echo", "threads": arguments["threads"]}}
        print("noise that is no answer")

    def decode(self, batch, context, steps):
        return {{"seconds": batch / 1000}}

    def prefill(self, length, seed):
        return {{"seconds": length / 1000}}

    def serve(self, count, prompt, output, seed):
        raise RuntimeError("cannot serve")

run(take_standard_output(), Echo)
"""


@pytest.fixture
def echo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PeerChoice:
    """A peer that answers at once: a thousand tokens a second."""
    script = tmp_path / "echo.py"
    script.write_text(_ECHO.format(folder=str(Path(process.__file__).parent)))
    monkeypatch.setitem(process.SCRIPTS, "vllm", str(script))
    return PeerChoice("vllm", sys.executable, str(tmp_path))


def test_a_peer_is_measured_in_turns_with_ours(echo: PeerChoice, tmp_path: Path) -> None:
    """Otherwise a figure would compare two moments of a machine, or other work."""
    model = tiny.write_directory(tmp_path / "model")
    config = ExecsvcConfig(model=str(model), device="cpu", kv_cache_tokens=2048, max_model_len=128, num_threads=1)
    document = compare(Request(config, (1, 2), (32,), (40,), 4), [echo], 2, lambda _: None)
    assert document["peers"] == {echo.name: {"version": "echo", "threads": 1}}
    assert [row["case"] for row in document["rows"]] == ["decode 1 x 32", "decode 2 x 32", "prompt of 40"]
    for row in document["rows"]:
        assert row["peers"][echo.name] == pytest.approx(1000)
        assert row["ratios"][echo.name] == pytest.approx(row["tokens_per_second"] / 1000)
        assert [len(found) for found in row["seconds"].values()] == [2, 2]


def test_our_engine_alone_answers_as_a_peer(tmp_path: Path) -> None:
    """The share of the executor that the whole system keeps is measured with it."""
    model = tiny.write_directory(tmp_path / "model")
    with Peer(PeerChoice(ALONE, sys.executable, str(model)), 1, 128, 4) as peer:
        assert peer.about["threads"] == 1
        answer = peer.ask(what="serve", count=3, prompt=20, output=5, seed=1)
        assert answer["tokens"] == 15
        assert answer["seconds"] > 0
        assert peer.ask(what="decode", batch=2, context=32, steps=4)["seconds"] > 0
        assert peer.ask(what="prefill", length=40, seed=1)["seconds"] > 0


def test_a_peer_that_fails_says_why(echo: PeerChoice) -> None:
    """Otherwise what is wrong with another's environment could only be guessed."""
    with Peer(echo, 1, 64, 1) as peer, pytest.raises(QuireError, match="RuntimeError: cannot serve"):
        peer.ask(what="serve", count=1, prompt=1, output=1, seed=0)


@pytest.mark.parametrize(
    ("peers", "models", "message"),
    [
        ("sglang=python", "", "found 'sglang=python', expected NAME=PATH with a name of vllm, llamacpp"),
        (f"vllm={sys.executable}", "llamacpp=/", "found 'llamacpp', which --peer does not name"),
        (f"vllm={sys.executable}", "vllm=/nowhere", "'/nowhere' is not there"),
        ("vllm=/nowhere", "vllm=/", "'/nowhere' is not a program"),
        (f"vllm={sys.executable},llamacpp={sys.executable}", "vllm=/", "none for llamacpp"),
    ],
)
def test_a_wrong_peer_is_refused(peers: str, models: str, message: str) -> None:
    """Before minutes are spent on starting the others."""
    with pytest.raises(ConfigError, match=message):
        choices(peers, models)


def test_one_peer_runs_with_several_models() -> None:
    """The same program in 16 and in 4 bits are two figures."""
    found = choices(f"llamacpp={sys.executable}", "llamacpp=/tmp,llamacpp=/usr")
    assert [choice.name for choice in found] == ["llamacpp tmp", "llamacpp usr"]
