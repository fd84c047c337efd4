"""Runs measurements in a process of their own and reads what they found."""

from __future__ import annotations

from collections.abc import Callable
import json
import subprocess
from typing import Any

from quire.cli.output import notices
from quire.errors import ConfigError, QuireError


def run_measurements(command: list[str]) -> dict[str, Any]:
    """Runs the measurements of `command` behind a line that says how far they are; see `read_document`."""
    with notices().status("measuring") as status:
        return read_document(command, "measurements", status.update)


def read_document(
    command: list[str], what: str, say: Callable[[str], None], *, failure: str = "BENCH_FAILED"
) -> dict[str, Any]:
    """Runs `command` in a process of its own and returns the document that it prints.

    Args:
        command: the program and its arguments.
        what: names the work where it ends without a document.
        say: is called with each line that it has to say of its progress.
        failure: reason of the error then.

    Raises:
        ConfigError: a setting is not possible.
        QuireError: it failed otherwise.
    """
    last = ""
    with subprocess.Popen(  # noqa: S603 - our own module
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stderr:
            last = line.strip() or last
            say(last)
        output = process.stdout.read()
    try:
        document: dict[str, Any] = json.loads(output)
    except ValueError:
        message = f"the {what} ended with status {process.returncode}: {last}"
        raise QuireError(message, reason=failure) from None
    error = document.get("error")
    if error is not None:
        cls = ConfigError if error["reason"] == ConfigError.default_reason else QuireError
        raise cls(error["message"], reason=error["reason"], field=error["field"])
    return document
