"""`quire explain`, `prefixes`, `pin`, `release`, `evict`, `sizes` and `leaks` against the real services."""

from __future__ import annotations

import json

import pytest

from quire import Client
from quire.cli import main
from tests.integration.stack import POOL_ID, Stack

TEXT = "A quire is a gathering of folded sheets, and a book is made of many of them, sewn one behind the other. " * 6


def test_a_prefix_is_explained_pinned_released_and_evicted(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An operator follows one prompt from its first miss to the day it must go."""
    monkeypatch.setenv("QUIRE_ADMIN_ADDRESS", stack.memsvc.address)
    assert main.run(["explain", POOL_ID, TEXT]) == 0
    assert "block 0: never_seen" in capsys.readouterr().out
    with Client(stack.address) as client:
        client.generate(TEXT, max_tokens=1, temperature=0)
        stack.wait_idle()
        assert main.run(["explain", POOL_ID, TEXT, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["reason"], found["cached_token_count"]) == ("none", found["token_count"])
        assert main.run(["pin", POOL_ID, TEXT]) == 1
        assert "--pinned" in capsys.readouterr().err
        assert main.run(["quota", POOL_ID, "", "--pinned", "60"]) == 0
        assert main.run(["pin", POOL_ID, TEXT]) == 0
        blocks = int(capsys.readouterr().out.splitlines()[-1].split()[0])
        assert blocks == found["token_count"] // 16
        assert main.run(["evict", POOL_ID, TEXT]) == 0
        assert f"{blocks} stay" in capsys.readouterr().out
        assert main.run(["release", POOL_ID, TEXT]) == 0
        assert f"{blocks} blocks were released" in capsys.readouterr().out
        streams = [client.stream(TEXT + end, max_tokens=200, temperature=0, ignore_eos=True) for end in ("A", "B")]
        for stream in streams:
            next(stream.text())
        assert main.run(["prefixes", POOL_ID, "--json"]) == 0
        (shared, *_) = json.loads(capsys.readouterr().out)
        assert shared["ref_count"] == 2
        assert main.run(["prefixes", POOL_ID]) == 0
        assert shared["identity"] in capsys.readouterr().out
        assert main.run(["sizes", POOL_ID, "--blocks", "8", "--blocks", "100000", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        small, large = (int(size["hit_token_count"]) for size in told["sizes"])
        assert small < large == int(told["endless_hit_token_count"])
        assert main.run(["sizes", POOL_ID]) == 0
        assert "of these tokens were cached" in capsys.readouterr().out
        assert main.run(["leaks", "--older-than", "0", "--json"]) == 0
        assert any(one["sequence_id"] for one in json.loads(capsys.readouterr().out))
        for stream in streams:
            stream.close()
    stack.wait_idle()
    assert main.run(["leaks", "--older-than", "3600"]) == 0
    assert "nothing is held" in capsys.readouterr().err
    assert main.run(["evict", POOL_ID, shared["identity"], "--identity"]) == 0
    assert main.run(["explain", POOL_ID, TEXT]) == 0
    assert "block 0: evicted" in capsys.readouterr().out
    assert main.run(["quota", POOL_ID, "", "--clear"]) == 0
    for arguments in (["evict", POOL_ID, "xyz", "--identity"], ["evict", POOL_ID, TEXT], ["explain", "nope", TEXT]):
        assert main.run(arguments) == 1
