"""One supervised process: its log file, its last lines, and how it ends."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
import contextlib
import json
from pathlib import Path
import re
import signal
from typing import Final

from quire.errors import ConfigError, NotReadyError, QuireError
from quire.serve.plan import ServiceProcess

TAIL_LINES: Final = 20
_FOLLOW_SECONDS: Final = 0.1
_READ_BYTES: Final = 2**20
_LINE_BYTES: Final = 2**16
# What a service gets beyond its own drain before it is killed.
_STOP_MARGIN_SECONDS: Final = 5.0
# Exit statuses of a service: it cannot work, its settings are wrong.
EXIT_FAILURE: Final = 1
EXIT_CONFIG: Final = 2

# How a service says in one line why it ends; argparse adds the "error: ".
_FINAL_WORDS: Final = re.compile(r"(?:(?:quire )?(?:memsvc|execsvc|gateway)(?:: error)?|error): (?P<reason>.+)")
_RAISED: Final = re.compile(r"[\w.]*(Error|Exception|Exit|Interrupt)\b|Fatal|fatal")

LineListener = Callable[[str, str], None]


class Child:
    """A service's process, started as often as need be.

    It writes to a file, not to a pipe: its log outlives the supervisor. It has a process group of its own, so that a
    Ctrl-C on the terminal reaches the supervisor alone, which then stops the services in their order.
    """

    def __init__(self, plan: ServiceProcess, log_directory: Path, listener: LineListener) -> None:
        """Prepares the process of `plan`; `listener(name, line)` hears every line that it logs."""
        self.plan = plan
        self.log_path = log_directory / f"{plan.name}.log"
        self.last_lines: deque[str] = deque(maxlen=TAIL_LINES)
        self._listener = listener
        self._process: asyncio.subprocess.Process | None = None
        self._position = 0
        self._partial = b""

    @property
    def name(self) -> str:
        """Name of the service."""
        return self.plan.name

    @property
    def running(self) -> bool:
        """Whether there is a process that has not ended."""
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int:
        """Process id of the latest start."""
        assert self._process is not None
        return self._process.pid

    def rotate_log(self) -> None:
        """Moves the log of an earlier run aside, to NAME.log.1."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        if self.log_path.exists():
            self.log_path.replace(self.log_path.with_suffix(".log.1"))

    async def start(self) -> None:
        """Starts the process."""
        assert not self.running
        self.last_lines.clear()
        with self.log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self.plan.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(self.plan.environment),
                process_group=0,
            )

    async def wait(self) -> int:
        """Returns the exit status once the process has ended; negative for a signal."""
        assert self._process is not None
        status = await self._process.wait()
        self.read_log()
        return status

    async def stop(self) -> None:
        """Asks the process to drain, and kills it if it takes longer than it may."""
        if self._process is None:
            return
        self._signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), self.plan.drain_grace + _STOP_MARGIN_SECONDS)
        except TimeoutError:
            self.kill()
            await self._process.wait()
        self.read_log()

    def kill(self) -> None:
        """Kills the process."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self.running:
            assert self._process is not None
            # It may end between the question and the signal.
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def follow_log(self) -> None:
        """Reads the log as it grows, until cancelled."""
        while True:
            self.read_log()
            await asyncio.sleep(_FOLLOW_SECONDS)

    def read_log(self) -> None:
        """Reads what the log has grown by."""
        if not self.log_path.exists():
            return
        with self.log_path.open("rb") as log:
            log.seek(self._position)
            while chunk := log.read(_READ_BYTES):
                self._position += len(chunk)
                *lines, self._partial = (self._partial + chunk).split(b"\n")
                self._partial = self._partial[-_LINE_BYTES:]
                for line in lines:
                    self._hear(line.decode(errors="replace"))

    def _hear(self, line: str) -> None:
        if line.strip():
            self.last_lines.append(line)
            self._listener(self.name, line)

    def failure(self, status: int) -> QuireError:
        """Returns the error that says why the process ended with `status`, in its own words."""
        reason = last_error(list(self.last_lines))
        if status < 0:
            message = f"{self.name} was killed by {signal.Signals(-status).name}" + (f": {reason}" if reason else "")
        else:
            message = f"{self.name}: {reason or f'ended with status {status} and said nothing'}"
        if status == EXIT_CONFIG:
            return ConfigError(message, metadata={"service": self.name, "log": self.log_path})
        metadata = {"service": self.name, "log": self.log_path}
        return NotReadyError(message, reason="SERVICE_FAILED", metadata=metadata)


def event_of(line: str) -> dict[str, object] | None:
    """Returns the event that a log line holds, None for plain text."""
    if not line.startswith("{"):
        return None
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


def last_error(lines: list[str]) -> str:
    """Returns what the last lines of a log say went wrong, in one line; empty if they say nothing.

    A line of the form `quire execsvc: ...` or `error: ...` is best, then an event of level error, then the last line
    that looks like the end of a traceback.
    """
    for line in reversed(lines):
        if match := _FINAL_WORDS.match(line):
            return match["reason"].strip()
    for line in reversed(lines):
        event = event_of(line)
        if event is not None and event.get("level") in {"error", "critical"}:
            return str(event.get("message") or event.get("error") or event.get("event"))
    raised = [line for line in lines if _RAISED.match(line)]
    return raised[-1].strip() if raised else ""
