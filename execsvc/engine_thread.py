"""One thread owns the engine; coroutines hand it work and await the result.

Work of two halves, a step on a device that works beside the host, is begun and finished on that thread, too; between
the halves a second thread waits for the device, so that the first can begin the next step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
import dataclasses
import functools
import queue
import threading
from typing import Any, ParamSpec, Protocol, TypeVar

import structlog

from execsvc import device_failure
from quire.errors import NotReadyError, QuireError

log = structlog.get_logger(__name__)

_QUEUE_LIMIT = 64
_JOIN_SECONDS = 30.0

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class Begun(Protocol):
    """Work whose first half is done."""

    @property
    def deferred(self) -> bool:
        """Whether there is anything to wait for."""
        ...

    def wait(self) -> None:
        """Waits until the second half can be done. Called on another thread."""
        ...


Half = TypeVar("Half", bound=Begun)


@dataclasses.dataclass(frozen=True, slots=True)
class _Job:
    """Work for the engine's thread."""

    function: Callable[[], Any]
    future: asyncio.Future[Any]
    finish: Callable[[Any], Any] | None = None
    """The second half, given what `function` returned."""
    waited: bool = False
    """Whether this is a second half that was waited for."""


class EngineThread:
    """Runs functions one after the other, in the order they were handed over.

    The queue is bounded: `call` waits for room. An exception that is no QuireError is a defect or a broken device: it
    is given to `on_defect`, and its caller and all that come after are told that the executor is not available. Nobody
    is told then that something was dropped or fenced.
    """

    def __init__(self, on_defect: Callable[[BaseException], None]) -> None:
        """Starts the thread. Call from the event loop that will call `call`."""
        self._loop = asyncio.get_running_loop()
        self._on_defect = on_defect
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._begun: queue.SimpleQueue[tuple[_Job, Begun] | None] = queue.SimpleQueue()
        self._waiter: threading.Thread | None = None
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
        return await self._submit(lambda: function(*args, **kwargs), None)

    async def submit_halves(
        self, begin: Callable[[], Half], finish: Callable[[Half], Result]
    ) -> asyncio.Future[Result]:
        """Hands over work of two halves and returns a future of what `finish` makes of what `begin` returned.

        Halves run in the order of the calls, the second ones among themselves; other work may come between the two.
        """
        return await self._submit(begin, finish)

    async def _submit(self, function: Callable[[], Any], finish: Callable[[Any], Any] | None) -> asyncio.Future[Any]:
        """Puts a job into the queue."""
        await self._room.acquire()
        if self._closed:
            self._room.release()
            raise NotReadyError("the executor is stopping", reason="DRAINING")
        future: asyncio.Future[Any] = self._loop.create_future()
        future.add_done_callback(_observe)
        self._jobs.put(_Job(function, future, finish))
        return future

    async def close(self) -> None:
        """Refuses new work, finishes what was handed over, and ends the thread."""
        if not self._closed:
            self._closed = True
            self._jobs.put(None)
            await asyncio.to_thread(self._thread.join, _JOIN_SECONDS)

    def _run(self) -> None:
        waiting, closing = 0, False
        broken: QuireError | None = None
        while not closing or waiting:
            job = self._jobs.get()
            if job is None:
                closing = True
                continue
            waiting -= job.waited
            outcome: Any = None
            error: BaseException | None = None
            try:
                if broken is not None:
                    raise broken
                outcome = job.function()
                if job.finish is not None:
                    if outcome.deferred:
                        self._wait_for(job, outcome)
                        waiting += 1
                        continue
                    outcome = job.finish(outcome)
            except BaseException as raised:  # noqa: BLE001 - it travels to the caller
                outcome, error = None, raised
            defect = None if error is None or isinstance(error, QuireError) else error
            if defect is not None:
                error = broken = device_failure.unavailable(defect)
            try:
                self._loop.call_soon_threadsafe(self._finish, job.future, outcome, error, defect)
            except RuntimeError:  # the loop is closed: nobody waits any more
                break
        if self._waiter is not None:
            self._begun.put(None)

    def _wait_for(self, job: _Job, begun: Begun) -> None:
        """Has the second thread wait; it hands the second half back."""
        if self._waiter is None:
            self._waiter = threading.Thread(target=self._wait, name="engine-waiter", daemon=True)
            self._waiter.start()
        self._begun.put((job, begun))

    def _wait(self) -> None:
        while (entry := self._begun.get()) is not None:
            job, begun = entry
            finish = job.finish
            assert finish is not None, "only work of two halves is waited for"
            try:
                begun.wait()
            except BaseException as raised:  # noqa: BLE001 - it travels to the caller
                self._jobs.put(_Job(functools.partial(_raise, raised), job.future, waited=True))
            else:
                self._jobs.put(_Job(functools.partial(finish, begun), job.future, waited=True))

    def _finish(
        self, future: asyncio.Future[Any], outcome: object, error: BaseException | None, defect: BaseException | None
    ) -> None:
        """Settles a future, on the event loop."""
        self._room.release()
        if defect is not None:
            self._on_defect(defect)
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


def _raise(error: BaseException) -> None:
    raise error
