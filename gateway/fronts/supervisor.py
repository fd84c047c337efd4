"""Starts the engine and the fronts of a gateway, starts again what dies, and drains the fronts before the engine.

This process serves nobody: whatever happens to a worker, it can say so and start another one. Workers are started anew
(never forked: gRPC does not survive that), each in a process group of its own, so that a Ctrl-C reaches this process
alone. They share its log.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
import contextlib
import os
from pathlib import Path
import signal
import socket
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Final

import structlog

from gateway.fronts.worker import ENGINE
from gateway.server import complete
from quire.errors import ConfigError
from quire.serve.supervisor import MAX_RESTARTS, RESTART_WINDOW_SECONDS, restart_delay

if TYPE_CHECKING:
    from gateway.config import GatewayConfig

log = structlog.get_logger(__name__)

_PARENT_POLL_SECONDS: Final = 0.5
_STOP_MARGIN_SECONDS: Final = 2.0
"""What a worker gets beyond its own drain before it is killed."""
_SOCKET: Final = "engine.sock"
_LONGEST_SOCKET: Final = 107
"""Of Linux, in bytes; see unix(7)."""
_EARLY_SECONDS: Final = 5.0
# Statuses of a worker that would fail again in the same way, if it has them early: its settings, its address.
_REFUSALS: Final = {1, 2}


def worker_command() -> tuple[str, ...]:
    """Returns what starts a worker, before its flags."""
    return (sys.executable, "-m", "gateway.fronts.worker")


class _Worker:
    """One process, started as often as need be."""

    def __init__(self, name: str, command: Sequence[str], drain_grace: float) -> None:
        self.name = name
        self._command = command
        self._drain_grace = drain_grace
        self._process: asyncio.subprocess.Process | None = None

    async def run(self) -> int:
        """Runs the process to its end; returns its exit status, negative for a signal."""
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=asyncio.subprocess.DEVNULL, process_group=0
        )
        log.info("worker_started", worker=self.name, pid=self._process.pid)
        return await self._process.wait()

    async def stop(self) -> None:
        """Asks the process to drain, and kills it if it takes longer than it may."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        self.signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), self._drain_grace + _STOP_MARGIN_SECONDS)
        except TimeoutError:
            log.warning("worker_killed", worker=self.name, pid=process.pid)
            self.signal(signal.SIGKILL)
            await process.wait()

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal, if the process runs."""
        if self._process is not None and self._process.returncode is None:
            # It may end between the question and the signal.
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)


class FrontSupervisor:
    """The processes of one gateway.

    Args:
        config: of the gateway; its port is not 0.
        argv: flags that it was given.
        engine_address: where the engine is to listen for the fronts.
    """

    def __init__(self, config: GatewayConfig, argv: Sequence[str], engine_address: str) -> None:
        self._config = config
        self._stop_reason = ""
        self._stop_requested = asyncio.Event()
        common = [
            *(*worker_command(), *argv),
            *("--port", str(config.port), "--gateway-id", config.gateway_id),
            *("--parent-pid", str(os.getpid()), "--engine-address", engine_address),
        ]
        names = [ENGINE, *(f"front-{number}" for number in range(config.api_server_count))]
        self._engine, *self._fronts = [_Worker(name, [*common, "--worker", name], config.drain_grace) for name in names]

    def request_stop(self, reason: str) -> None:
        """Ends the run; asked again, kills what is still draining."""
        if self._stop_requested.is_set():
            log.warning("workers_killed", reason=reason)
            for worker in (self._engine, *self._fronts):
                worker.signal(signal.SIGKILL)
        else:
            self._stop_reason = reason
            self._stop_requested.set()

    async def run(self) -> int:
        """Runs until told to stop, or until a worker cannot be kept running; returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.request_stop, signal.Signals(number).name)
        keepers = [
            asyncio.create_task(self._keep(worker), name=f"keep-{worker.name}")
            for worker in (self._engine, *self._fronts)
        ]
        stop = asyncio.create_task(self._stop_requested.wait(), name="stop")
        watch = asyncio.create_task(self._watch_parent(), name="parent-watch")
        try:
            finished, _ = await asyncio.wait([stop, *keepers], return_when=asyncio.FIRST_COMPLETED)
            codes = [task.result() for task in keepers if task in finished]
            log.info("workers_draining", reason=self._stop_reason or "a worker has ended")
        finally:
            for task in (stop, watch, *keepers):
                task.cancel()
            await asyncio.gather(stop, watch, *keepers, return_exceptions=True)
            await asyncio.gather(*(front.stop() for front in self._fronts))
            await self._engine.stop()
        return codes[0] if codes else 0

    async def _watch_parent(self) -> None:
        """Requests a stop when the parent process is gone (then another process has adopted this one)."""
        wanted = self._config.parent_pid
        while not wanted or os.getppid() == wanted:  # noqa: ASYNC110 - the system tells nobody, it must be asked
            await asyncio.sleep(_PARENT_POLL_SECONDS)
        self.request_stop("parent process is gone")

    async def _keep(self, worker: _Worker) -> int:
        """Runs a worker again whenever it ends; returns an exit code once that makes no sense any more."""
        restarts: deque[float] = deque(maxlen=MAX_RESTARTS)
        has_lasted = False
        while True:
            begun = time.monotonic()
            status = await worker.run()
            now = time.monotonic()
            has_lasted = has_lasted or now - begun > _EARLY_SECONDS
            while restarts and restarts[0] < now - RESTART_WINDOW_SECONDS:
                restarts.popleft()
            if (not has_lasted and status in _REFUSALS) or len(restarts) == MAX_RESTARTS:
                log.error("worker_failed", worker=worker.name, status=status)
                return status if status > 0 else 1
            delay = restart_delay(len(restarts))
            restarts.append(now)
            log.warning("worker_lost", worker=worker.name, status=status, restart_seconds=delay)
            await asyncio.sleep(delay)


def reserve_port(host: str, port: int) -> socket.socket:
    """Takes a port that this user's processes may share, and keeps it as long as the socket is open.

    Raises:
        ConfigError: it is in use, also by another gateway of several fronts, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    address = host.strip("[]")
    try:
        # Only a socket that shares with nobody sees whether somebody is there.
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
            port = probe.getsockname()[1]
        reserved = socket.socket(family, socket.SOCK_STREAM)
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind((address, port))
    except OSError as error:
        message = f"cannot listen on {host}:{port}: {(error.strerror or str(error)).lower()}; choose --port"
        raise ConfigError(message, field="port") from error
    return reserved


def socket_directory() -> tempfile.TemporaryDirectory[str]:
    """Makes the directory of the engine's socket: only this user may enter it, and so call the engine.

    Raises:
        ConfigError: there is none in which it can be made, or its name is too long for a socket.
    """
    try:
        directory = tempfile.TemporaryDirectory(prefix="quire-gateway-")
    except OSError as error:
        message = f"no directory for the engine's socket: {error.strerror or error}; set TMPDIR to one that is writable"
        raise ConfigError(message) from error
    path = str(Path(directory.name) / _SOCKET)
    if len(os.fsencode(path)) > _LONGEST_SOCKET:
        directory.cleanup()
        message = (
            f"the engine's socket would be {path}, allowed are {_LONGEST_SOCKET} bytes; set TMPDIR to a shorter one"
        )
        raise ConfigError(message)
    return directory


async def supervise(config: GatewayConfig, argv: Sequence[str]) -> int:
    """Runs a gateway of several fronts until it is told to stop; returns the exit code.

    Raises:
        ConfigError: the address cannot be bound, or there is no place for the engine's socket.
    """
    with reserve_port(config.host, config.port) as reserved, socket_directory() as directory:
        config = complete(config, port=reserved.getsockname()[1])
        return await FrontSupervisor(config, argv, f"unix:{Path(directory) / _SOCKET}").run()
