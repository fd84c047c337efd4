"""One thread owns the engine; coroutines hand it work and await the result."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
import queue
import threading
from typing import Any, ParamSpec, TypeVar

import structlog

from quire.errors import NotReadyError, QuireError

log = structlog.get_logger(__name__)

_QUEUE_LIMIT = 64
_JOIN_SECONDS = 30.0

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class EngineThread:
    """Runs functions one after the other, in the order they were handed over.

    The queue is bounded: `call` waits for room. An exception that is no QuireError is a defect or a broken device: it
    is given to `on_defect` besides the caller.
    """

    def __init__(self, on_defect: Callable[[BaseException], None]) -> None:
        """Starts the thread. Call from the event loop that will call `call`."""
        self._loop = asyncio.get_running_loop()
        self._on_defect = on_defect
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]] | None] = queue.SimpleQueue()
        self._room = asyncio.Semaphore(_QUEUE_LIMIT)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def call(
        self, function: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Result:
        """Runs `function` on the thread and returns its result.

        A caller that is cancelled does not stop the function: what was handed over runs.

        Raises:
            NotReadyError: the thread is closed.
        """
        return await (await self.submit(function, *args, **kwargs))

    async def submit(
        self, function: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> asyncio.Future[Result]:
        """Hands `function` over, waiting for room, and returns a future of its result; raises as `call`."""
        await self._room.acquire()
        if self._closed:
            self._room.release()
            raise NotReadyError("the executor is stopping", reason="DRAINING")
        future: asyncio.Future[Result] = self._loop.create_future()
        future.add_done_callback(_observe)
        self._jobs.put((lambda: function(*args, **kwargs), future))
        return future

    async def close(self) -> None:
        """Refuses new work, finishes what was handed over, and ends the thread."""
        if not self._closed:
            self._closed = True
            self._jobs.put(None)
            await asyncio.to_thread(self._thread.join, _JOIN_SECONDS)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            function, future = job
            try:
                outcome, error = function(), None
            except BaseException as raised:  # noqa: BLE001 - it travels to the caller
                outcome, error = None, raised
            try:
                self._loop.call_soon_threadsafe(self._finish, future, outcome, error)
            except RuntimeError:  # the loop is closed: nobody waits any more
                return

    def _finish(self, future: asyncio.Future[Any], outcome: object, error: BaseException | None) -> None:
        """Settles a future, on the event loop."""
        self._room.release()
        if error is not None and not isinstance(error, QuireError):
            self._on_defect(error)
        if future.cancelled():
            return
        if error is None:
            future.set_result(outcome)
        else:
            future.set_exception(error)


def _observe(future: asyncio.Future[Any]) -> None:
    """Marks a future's exception as seen: its caller may have been cancelled."""
    if not future.cancelled():
        future.exception()
