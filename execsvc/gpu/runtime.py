"""What only a CUDA device has, behind one interface: pinned memory, events, captured graphs.

`EagerRuntime` does the same on the CPU, at once: what is captured is called again at each replay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class Event(Protocol):
    """A point in the order of the device's work."""

    def record(self) -> None:
        """Marks the end of what was handed to the device so far."""
        ...

    def synchronize(self) -> None:
        """Waits until the device has come to the mark. Any thread may wait."""
        ...


class Graph(Protocol):
    """Work that was captured once and is launched as a whole."""

    def replay(self) -> None:
        """Launches it: same memory, same sizes, whatever that memory holds now."""
        ...


class Runtime(Protocol):
    """One device and the order in which it works."""

    device: torch.device

    def pinned(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Returns host memory that the device copies to and from while the host goes on."""
        ...

    def event(self) -> Event:
        """Returns an event that is not recorded yet."""
        ...

    def capture(self, work: Callable[[], None]) -> Graph:
        """Runs `work` to warm it up, then captures it. Temporary memory comes from one pool for all graphs."""
        ...

    def synchronize(self) -> None:
        """Waits until the device has done everything."""
        ...


class EagerEvent:
    """An event where everything is done at once."""

    def record(self) -> None:
        """Does nothing."""

    def synchronize(self) -> None:
        """Does nothing."""


class EagerGraph:
    """Work that is called at each replay."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work

    def replay(self) -> None:
        """Calls the work."""
        self._work()


class EagerRuntime:
    """The CPU: nothing is asynchronous."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def pinned(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Returns ordinary memory."""
        return torch.zeros(size, dtype=dtype)

    def event(self) -> Event:
        """Returns an event that has always come to pass."""
        return EagerEvent()

    def capture(self, work: Callable[[], None]) -> Graph:
        """Keeps `work`; nothing has to be warmed up."""
        return EagerGraph(work)

    def synchronize(self) -> None:
        """Does nothing."""


class CudaRuntime:
    """A CUDA device.

    Everything runs on the current stream of the thread that launches, so that one step's writes are there when the
    next one reads. Graphs are captured on a stream of their own, as CUDA demands, and replayed on the current one.
    """

    def __init__(self, device: torch.device) -> None:
        """Works on `device`, an indexed CUDA device."""
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def pinned(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Returns page-locked memory."""
        return torch.zeros(size, dtype=dtype, pin_memory=True)

    def event(self) -> Event:
        """Returns an event whose waiters sleep: a spinning one would take a core from the gateway."""
        return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def capture(self, work: Callable[[], None]) -> Graph:
        """See Runtime. The first of two warm-ups compiles kernels, the second meets every cached handle."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for _ in range(2):
                work()
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            work()
        return graph

    def synchronize(self) -> None:
        """Waits for the whole device."""
        torch.cuda.synchronize(self.device)


def runtime_of(device: torch.device) -> Runtime:
    """Returns the runtime of a device."""
    return CudaRuntime(device) if device.type == "cuda" else EagerRuntime()
