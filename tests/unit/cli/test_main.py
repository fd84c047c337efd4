"""The command line: help everywhere, one line for an error, the right exit status."""

import re

import pytest

from quire.cli import main
from quire.errors import ConfigError, NotReadyError, QuireError

COMMANDS = ["serve", "demo", "generate", "chat", "health", "pools", "sequences", "blocks", "block"]


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """A command that is not listed is not found."""
    assert main.run(["--help"]) == 0
    text = capsys.readouterr().out
    for command in [*COMMANDS, "memsvc", "execsvc", "gateway"]:
        assert re.search(rf"\b{command}\b", text), command


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An example is what people read first."""
    assert main.run([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "For example:" in text
    assert f" quire {command}" in text.partition("For example:")[2]


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["generate"],
        ["generate", "x", "--n", "many"],
        ["generate", "x", "--nonsense"],
        ["serve"],
        ["serve", "--model", "/no/such/model"],
        ["serve", "--model", "smollm2", "--port", "70000"],
        ["block", "pool", "minus"],
        ["block", "pool", "-1"],
    ],
)
def test_wrong_usage_is_one_line_and_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Scripts tell a typo from a failure by the status, people by the line."""
    assert main.run(arguments) == 2
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) <= 2
    assert "Traceback" not in printed.err + printed.out


@pytest.mark.parametrize(
    "arguments",
    [["generate", "x", "--address"], ["pools", "--memsvc"], ["sequences", "--memsvc"], ["blocks", "x", "--memsvc"]],
)
def test_a_server_that_is_not_there_is_one_line_and_a_hint(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The first thing that goes wrong for a new user is that nothing runs yet."""
    assert main.run([*arguments, "127.0.0.1:1"]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: nothing answers at 127.0.0.1:1"
    assert second.startswith("hint: is it running?")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NotReadyError("down"), 1),
        (ConfigError("bad"), 2),
        (QuireError("odd"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_every_failure_has_its_status(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """0 done, 1 failed, 2 wrong settings, 130 interrupted: what a shell script expects."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(main, "app", fail)
    assert main.run([]) == status
    assert "Traceback" not in capsys.readouterr().err


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Bug reports need it."""
    assert main.run(["--version"]) == 0
    assert re.fullmatch(r"quire \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Who types the bare name wants to know what there is."""
    assert main.run([]) == 2
    printed = capsys.readouterr()
    assert "generate" in printed.out + printed.err
    assert "error:" not in printed.err
