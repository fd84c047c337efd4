"""The peer's process: asked one thing at a time, and every way in which it fails is told."""

from __future__ import annotations

from pathlib import Path
import sys

import pytest

from memsvc.bench.peer import Peer
from quire.errors import ConfigError, QuireError

ANSWERS = """
import json, sys
print(json.dumps({"name": "fake", "version": sys.argv[1]}), flush=True)
for line in sys.stdin:
    name = line.strip()
    print(json.dumps({"error": "ValueError: no"} if name == "bad" else {name: [0.5, 1]}), flush=True)
"""


def script(folder: Path, text: str) -> Path:
    """Writes a program that plays the peer."""
    path = folder / "peer.py"
    path.write_text(text)
    return path


async def test_measurements_are_answered_one_by_one(tmp_path: Path) -> None:
    """Otherwise the two sides do not alternate, and a busy moment is one side's alone."""
    peer = Peer(sys.executable, 32, script(tmp_path, ANSWERS))
    await peer.start()
    try:
        assert peer.about == {"name": "fake", "version": "32"}
        assert await peer.sample("step") == {"step": [0.5, 1.0]}
        with pytest.raises(QuireError, match="failed at bad: ValueError: no"):
            await peer.sample("bad")
        assert await peer.sample("hash") == {"hash": [0.5, 1.0]}
    finally:
        await peer.close()


async def test_an_interpreter_that_is_not_there_is_named() -> None:
    """Otherwise a typing error is a traceback."""
    with pytest.raises(ConfigError, match="--peer: '/no/such/python' is not a program"):
        await Peer("/no/such/python", 16).start()


async def test_an_interpreter_without_vllm_says_what_is_missing() -> None:
    """Otherwise nobody knows what to install; this test's own interpreter has no vllm."""
    with pytest.raises(ConfigError, match=r"cannot run vllm: ModuleNotFoundError: No module named"):
        await Peer(sys.executable, 16).start()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("raise SystemExit(3)", "ended with status 3"),
        ("print('hello')", "wrote b'hello"),
        ("print(7)", "not an answer"),
    ],
)
async def test_a_program_that_is_no_peer_is_told_apart(tmp_path: Path, text: str, words: str) -> None:
    """Otherwise the command hangs, or shows a parser's error."""
    with pytest.raises(ConfigError, match=words):
        await Peer(sys.executable, 16, script(tmp_path, text)).start()
