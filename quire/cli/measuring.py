"""Runs measurements in a process of their own and reads what they found."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from quire.cli.output import notices
from quire.errors import ConfigError, QuireError


def run_measurements(command: list[str]) -> dict[str, Any]:
    """Runs the measurements in a process of their own and returns their document; shows their progress.

    Raises:
        QuireError: what they failed with.
    """
    with (
        notices().status("measuring") as status,
        subprocess.Popen(  # noqa: S603 - our own module
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stderr is not None
        last = ""
        for line in process.stderr:
            last = line.strip() or last
            status.update(last)
        output = process.stdout.read()
    try:
        document: dict[str, Any] = json.loads(output)
    except ValueError:
        message = f"the measurements ended with status {process.returncode}: {last}"
        raise QuireError(message, reason="BENCH_FAILED") from None
    error = document.get("error")
    if error is not None:
        cls = ConfigError if error["reason"] == ConfigError.default_reason else QuireError
        raise cls(error["message"], reason=error["reason"], field=error["field"])
    return document
