"""A service in a process of its own, on loopback, for as long as it is measured."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
import contextlib
import json
import os
from pathlib import Path
import sys
from typing import TYPE_CHECKING, TypeVar

from quire.config import ServiceConfig, load
from quire.errors import NotReadyError, UnsupportedError
from quire.logging import configure_logging
from quire.service_host import ServiceHost

if TYPE_CHECKING:
    import grpc

Config = TypeVar("Config", bound=ServiceConfig)

_START_SECONDS = 30.0
_STOP_SECONDS = 10.0
_STAT_USER, _STAT_SYSTEM = 13, 14
"""Places of utime and stime in /proc/PID/stat, from 0; see proc(5)."""


def run_service(
    config_type: type[Config], name: str, service: str, add: Callable[[Config, grpc.aio.Server], None]
) -> None:
    """Serves one gRPC service until the process is told to stop: what a `ServiceProcess` runs.

    Args:
        config_type: settings, from the flags of the process.
        name: of the program.
        service: full name of the gRPC service.
        add: adds its servicer to a server.
    """
    config, _ = load(config_type, name, sys.argv[1:], os.environ)
    configure_logging(config.log_level, config.log_format, service=name)
    asyncio.run(_serve(config, service, add))


async def _serve(config: Config, service: str, add: Callable[[Config, grpc.aio.Server], None]) -> None:
    host = ServiceHost(config, (service,))
    add(config, host.server)
    await host.start()
    await host.set_serving(serving=True)
    await host.wait_for_stop()
    await host.stop()


class ServiceProcess:
    """`python -m MODULE` on a free port, which says in its log where it listens.

    Args:
        module: what to run.
        flags: its flags, besides those for a free port, a JSON log, and the end of its parent.
        event: the event of its log that carries `address`.
        own_settings: prefix of the environment variables that it is not to see: what the caller's environment sets
            is not what is measured.
    """

    def __init__(self, module: str, flags: tuple[str, ...], *, event: str, own_settings: str) -> None:
        self._module = module
        self._flags = flags
        self._event = event
        self._own_settings = own_settings
        self._process: asyncio.subprocess.Process | None = None
        self._log: asyncio.Task[None] | None = None
        self.address = ""

    async def start(self) -> None:
        """Starts the service and waits until it listens.

        Raises:
            NotReadyError: it ended, or does not come up in time.
        """
        flags = ["--port", "0", "--log-format", "json", "--log-level", "info", "--parent-pid", str(os.getpid())]
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", self._module, *flags, *self._flags),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env={name: value for name, value in os.environ.items() if not name.startswith(self._own_settings)},
        )
        try:
            self.address = await asyncio.wait_for(self._read_address(), _START_SECONDS)
        except TimeoutError:
            await self.close()
            raise NotReadyError(f"{self._module} did not serve within {_START_SECONDS:g} s") from None
        self._log = asyncio.create_task(self._drain(), name=f"{self._module}-log")

    def cpu_seconds(self) -> float:
        """Returns the processor time that the service has taken so far, on all its threads.

        Raises:
            UnsupportedError: the system does not tell (only Linux does).
        """
        assert self._process is not None
        return _cpu_seconds(self._process.pid)

    def worker_cpu_seconds(self) -> dict[str, float]:
        """Returns the same for each process that the service has started with `--worker NAME`, by name."""
        assert self._process is not None
        pid = self._process.pid
        found = {}
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split():
            command = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
            if "--worker" in command:
                found[command[command.index("--worker") + 1]] = _cpu_seconds(int(child))
        return found

    async def close(self) -> None:
        """Stops the service."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await asyncio.wait_for(process.wait(), _STOP_SECONDS)
        if self._log is not None:
            await self._log

    async def _read_address(self) -> str:
        """Reads the log until the service says where it listens."""
        assert self._process is not None
        assert self._process.stderr is not None
        last = b""
        async for line in self._process.stderr:
            last = line
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if event.get("event") == self._event:
                    return str(event["address"])
        raise NotReadyError(f"{self._module} ended before it served: {last.decode(errors='replace').strip()}")

    async def _drain(self) -> None:
        """Reads the rest of the log, so that the service never waits for us."""
        assert self._process is not None
        assert self._process.stderr is not None
        async for _ in self._process.stderr:
            pass


def _cpu_seconds(pid: int) -> float:
    """Returns the processor time of a process; raises UnsupportedError."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    except OSError as error:
        message = "the processor time of a process is read from /proc, which this system has not; use Linux"
        raise UnsupportedError(message) from error
    # The name of the command is in parentheses and may contain anything.
    fields = ["pid", "comm", *text.rpartition(")")[2].split()]
    return (int(fields[_STAT_USER]) + int(fields[_STAT_SYSTEM])) / os.sysconf("SC_CLK_TCK")
