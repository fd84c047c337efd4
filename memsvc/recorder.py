"""Writes the command log of a running service to files, beside the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
import time
from typing import Final
from urllib.parse import quote

import structlog

from memsvc.core.log import CommandLog, Segment
from memsvc.core.memory import MemoryCore
from memsvc.log_files import SUFFIX, LogFile
from quire.errors import ConfigError

log = structlog.get_logger(__name__)

INTERVAL_SECONDS: Final = 0.25
"""What came within so long may be lost when the process is killed."""


class LogRecorder:
    """Follows a command log.

    Args:
        commands: what is written.
        core: whose log it is.
        directory: where to; made if it is not there.
        name: name of the service, with which its files begin.
        limit_bytes: size of the service's files above which the oldest are removed.

    Raises:
        ConfigError: the directory cannot be made.
    """

    def __init__(self, commands: CommandLog, core: MemoryCore, directory: Path, name: str, limit_bytes: int) -> None:
        self._commands = commands
        self._core = core
        self._directory = directory
        self._prefix = f"{quote(name, safe='')}-"
        self._limit_bytes = limit_bytes
        self._file: LogFile | None = None
        self._task: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        self._follower = commands.follow()
        self._missed = 0
        # Files of several lives of a service are in the order of their names.
        self._started = f"{time.time_ns() // 1_000_000:014d}"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--log-dir: {directory}: {error.strerror}", field="log_dir") from error

    def start(self) -> None:
        """Begins to follow the log."""
        self._task = asyncio.create_task(self._follow(), name="recorder")

    async def close(self) -> None:
        """Writes what is left, and the digest of the state."""
        self._closing.set()
        if self._task is not None:
            await self._task
        if self._file is not None:
            with contextlib.suppress(OSError):
                if self._commands.ended:
                    # The log ended before its last commands were written: no state to compare a replay with.
                    self._file.close()
                else:
                    self._file.finish(self._core)

    async def _follow(self) -> None:
        """Writes until there is nothing more to come."""
        try:
            while not self._closing.is_set():
                await self._write()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(INTERVAL_SECONDS):
                        await self._closing.wait()
            await self._write()
        except (OSError, TypeError) as error:
            # The service is worth more than its log.
            log.exception("recorder_stopped", directory=str(self._directory), effect=f"nothing is written: {error}")
            file, self._file = self._file, None
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()

    async def _write(self) -> None:
        """Writes what came since the last time."""
        follower = self._follower
        if follower.missed != self._missed:
            log.warning(
                "recorder_late", missing_count=follower.missed - self._missed, effect="commands are not written"
            )
            self._missed = follower.missed
        segments = [(segment, len(segment.lines)) for segment in follower.segments]
        if not segments:
            return
        await asyncio.to_thread(self._write_all, segments)
        while follower.segments[0].first < segments[-1][0].first:
            follower.done()

    def _write_all(self, segments: list[tuple[Segment, int]]) -> None:
        """Writes the segments' entries up to the counts given; runs in a thread."""
        for segment, stop in segments:
            if self._file is None or self._file.segment is not segment:
                if self._file is not None:
                    self._end(self._file, segment)
                name = f"{self._prefix}{self._started}-{segment.first:012d}{SUFFIX}"
                self._file = LogFile(self._directory / name, segment)
                self._prune()
            self._file.write(stop)

    @staticmethod
    def _end(file: LogFile, following: Segment) -> None:
        """Ends a file, with the state that the segment after it begins with, if that is the one after it."""
        if file.segment.first + file.written == following.first:
            file.finish(following.base)
        else:
            file.close()

    def _prune(self) -> None:
        """Removes the oldest files of this service while all of them take too much; never the one that is written."""
        found = sorted(self._directory.glob(f"{self._prefix}*{SUFFIX}"))
        sizes = {path: path.stat().st_size for path in found}
        total = sum(sizes.values())
        for path in found:
            if total <= self._limit_bytes or (self._file is not None and path == self._file.path):
                break
            path.unlink(missing_ok=True)
            total -= sizes[path]
