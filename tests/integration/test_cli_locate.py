"""`quire locate` against the real services."""

from __future__ import annotations

import json

import pytest

from quire import Client
from quire.cli import main
from tests.integration.stack import POOL_ID, Stack

TEXT = "Paging keeps keys and values in blocks of fixed size, so that sequences share what is equal in them. " * 8


def test_locate_shows_where_a_prompt_is(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text and token ids of the same prompt are found alike; another tenant's are not."""
    monkeypatch.setenv("QUIRE_ADMIN_ADDRESS", stack.memsvc.address)
    with Client(stack.address) as client:
        usage = client.generate(TEXT, max_tokens=1, temperature=0).usage
    stack.wait_idle()
    assert main.run(["locate", TEXT, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["locations"]
    assert (found["pool_id"], found["exact"]) == (POOL_ID, True)
    assert found["token_count"] == usage.prompt_token_count - 1
    assert main.run(["locate", TEXT]) == 0
    row = capsys.readouterr().out.splitlines()[1].split()
    assert row[:4] == [POOL_ID, str(usage.prompt_token_count - 1), str(usage.prompt_token_count), "exact"]
    assert main.run(["locate", TEXT, "--tenant", "another"]) == 0
    assert POOL_ID not in capsys.readouterr().out
    assert main.run(["locate", "--token-ids", "1, 2 3"]) == 0
    assert POOL_ID not in capsys.readouterr().out


@pytest.mark.parametrize("text", ["1 two 3", "-1", "4294967296", ""])
def test_locate_refuses_what_is_no_prompt(text: str, capsys: pytest.CaptureFixture[str], stack: Stack) -> None:
    """Otherwise a typing error looks like a prompt that nobody has."""
    assert main.run(["locate", "--memsvc", stack.memsvc.address, "--token-ids", "--", text]) == 1
    assert "error:" in capsys.readouterr().err
