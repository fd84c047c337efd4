"""Starts the services in order, waits until they are healthy, restarts what dies, and stops them in reverse order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
import time
from typing import Final, Protocol

from quire.errors import DeadlineError
from quire.serve.child import EXIT_CONFIG, EXIT_FAILURE, Child, event_of
from quire.serve.plan import ServiceProcess
from quire.serve.readiness import Probe, Progress

MAX_RESTARTS: Final = 5
"""Restarts of one service within `RESTART_WINDOW_SECONDS`; at the next one everything stops."""
RESTART_WINDOW_SECONDS: Final = 60.0
_FIRST_BACKOFF_SECONDS: Final = 0.5
_LONGEST_BACKOFF_SECONDS: Final = 8.0
_PROBE_SECONDS: Final = 0.2
_LOUD_LEVELS: Final = {"warning", "error", "critical"}
# Statuses of a service that will fail again the same way: its settings, its model.
_REFUSALS: Final = {EXIT_FAILURE, EXIT_CONFIG}


class Reporter(Protocol):
    """Shows people what happens."""

    def progress(self, service: str, progress: Progress) -> None:
        """A service is this far in starting."""
        ...

    def log_line(self, service: str, line: str, *, loud: bool) -> None:
        """A service logged a line; `loud` from level warning up."""
        ...

    def note(self, text: str) -> None:
        """Something that a person at the terminal should know."""
        ...


def restart_delay(restarts: int) -> float:
    """Returns the seconds to wait before the next restart, after `restarts` in the last minute."""
    return float(min(_LONGEST_BACKOFF_SECONDS, _FIRST_BACKOFF_SECONDS * 2**restarts))


class Supervisor:
    """Runs processes for as long as a body of work lasts.

    Args:
        processes: in the order of starting; the first alone until it is healthy, then the others together.
        log_directory: gets one NAME.log a service.
        reporter: hears what happens.
        startup_timeout: seconds until all must be healthy.
        delay: seconds to wait before a restart, by the number of restarts in the last minute.
    """

    def __init__(
        self,
        processes: Sequence[ServiceProcess],
        log_directory: Path,
        reporter: Reporter,
        startup_timeout: float,
        delay: Callable[[int], float] = restart_delay,
    ) -> None:
        self._reporter = reporter
        self._delay = delay
        self._startup_timeout = startup_timeout
        self._children = [Child(process, log_directory, self._hear) for process in processes]
        self._may_start = {child.name: asyncio.Event() for child in self._children}
        self._progress: dict[str, Progress] = {}
        self._healthy = False
        self._stop = asyncio.Event()

    def request_stop(self) -> None:
        """Ends the run; asked again, kills what is still draining."""
        if self._stop.is_set():
            self._reporter.note("killing what is still running")
            for child in self._children:
                child.kill()
        self._stop.set()

    def pids(self) -> dict[str, int]:
        """Returns the process ids of the running services, by name."""
        return {child.name: child.pid for child in self._children if child.running}

    async def run(self, body: Callable[[], Awaitable[None]]) -> None:
        """Starts everything, runs `body` once all are healthy, and stops everything at its end or when asked to.

        Raises:
            ConfigError: a service refused its settings.
            NotReadyError: a service failed at the start, or later more often than it may.
            DeadlineError: not everything was healthy in time.
            Exception: whatever `body` raises.
        """
        stop = asyncio.create_task(self._stop.wait(), name="stop")
        work = asyncio.create_task(self._work(body), name="work")
        tasks = {stop, work}
        for child in self._children:
            child.rotate_log()
            tasks.add(asyncio.create_task(child.follow_log(), name=f"log-{child.name}"))
            tasks.add(asyncio.create_task(self._keep(child), name=f"keep-{child.name}"))
        try:
            # The other tasks end only by failing.
            finished, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.gather(*finished)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._stop.set()
            for child in reversed(self._children):
                await child.stop()

    async def _work(self, body: Callable[[], Awaitable[None]]) -> None:
        """Starts the services, waits until they are healthy, and runs `body`."""
        first, *others = self._children
        try:
            async with asyncio.timeout(self._startup_timeout):
                await self._start([first])
                await self._start(others)
        except TimeoutError:
            late = [f"{name} is {state.phase}" for name, state in self._progress.items() if not state.ready]
            message = f"not everything was healthy within {self._startup_timeout:g} s: {', '.join(late)}"
            raise DeadlineError(message) from None
        self._healthy = True
        await body()

    async def _start(self, children: Sequence[Child]) -> None:
        """Lets `children` start and waits until all are healthy."""
        for child in children:
            self._may_start[child.name].set()
        await asyncio.gather(*(self._await_health(child) for child in children))

    async def _await_health(self, child: Child) -> None:
        """Reports the progress of `child` until it is healthy."""
        probe = Probe(child.name, child.plan.address)
        try:
            while True:
                state = await probe.ask()
                if state != self._progress.get(child.name):
                    self._progress[child.name] = state
                    self._reporter.progress(child.name, state)
                if state.ready:
                    return
                await asyncio.sleep(_PROBE_SECONDS)
        finally:
            await probe.close()

    async def _keep(self, child: Child) -> None:
        """Starts `child` when its turn comes, and again whenever it has died; raises once that is too often."""
        await self._may_start[child.name].wait()
        restarts: deque[float] = deque(maxlen=MAX_RESTARTS)
        while True:
            await child.start()
            status = await child.wait()
            if not self._healthy and status in _REFUSALS:
                raise child.failure(status)
            now = time.monotonic()
            while restarts and restarts[0] < now - RESTART_WINDOW_SECONDS:
                restarts.popleft()
            if len(restarts) == MAX_RESTARTS:
                raise child.failure(status)
            delay = self._delay(len(restarts))
            restarts.append(now)
            self._reporter.note(f"{child.failure(status).message}; starting it again in {delay:g} s")
            await asyncio.sleep(delay)

    def _hear(self, service: str, line: str) -> None:
        """Passes on a line of a log."""
        event = event_of(line)
        self._reporter.log_line(service, line, loud=event is not None and event.get("level") in _LOUD_LEVELS)
