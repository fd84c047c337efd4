"""Progress on the terminal, commands that end in time, and the two ways in which a run can stop early."""

from collections.abc import Mapping, Sequence
import os
from pathlib import Path
import subprocess
import sys
import time

_STARTED = time.monotonic()


class CheckFailedError(Exception):
    """The stack does not do what it must. Exit status 1."""


class EngineUnavailableError(Exception):
    """This machine cannot run containers; the message says what is missing. Exit status 77."""


def say(message: str) -> None:
    """Prints a line of progress, with the seconds since the start, to standard error."""
    sys.stderr.write(f"[{time.monotonic() - _STARTED:6.1f} s] {message}\n")
    sys.stderr.flush()


def run(
    command: Sequence[str],
    *,
    timeout: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str | None = None,
    log: Path | None = None,
) -> str:
    """Runs a command and returns its standard output.

    Args:
        command: program and arguments.
        timeout: seconds; the command is killed after that.
        env: variables to add to this process's environment.
        cwd: working directory.
        stdin: text for its standard input, which is empty otherwise.
        log: file that standard output and error are appended to.

    Raises:
        CheckFailedError: it failed or ran out of time; the message has the end of its output.
    """
    environment = {**os.environ, **(env or {})}
    shown = " ".join(command)
    try:
        done = subprocess.run(
            command,
            timeout=timeout,
            env=environment,
            cwd=cwd,
            input=stdin or "",
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise CheckFailedError(f"{shown}: not finished after {timeout:.0f} s") from error
    except FileNotFoundError as error:
        raise CheckFailedError(f"{shown}: no such program") from error
    if log is not None:
        with log.open("a") as file:
            file.write(f"$ {shown}\n{done.stdout}{done.stderr}")
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
        raise CheckFailedError(f"{shown}: exit status {done.returncode}\n{tail}")
    return done.stdout


def succeeds(command: Sequence[str], *, timeout: float, env: Mapping[str, str] | None = None) -> bool:
    """Returns whether a command exists and ends with exit status 0 in time."""
    try:
        run(command, timeout=timeout, env=env)
    except CheckFailedError:
        return False
    return True
