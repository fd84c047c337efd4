"""What a step needs from the host, in one buffer and one copy.

The host fills a pinned buffer and goes on; the device copies it when it comes to this step. A pinned buffer is written
again only after its copy is done, so there are a few of them. On the device there is one: what reads it is ordered
before the next copy into it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from execsvc.gpu.runtime import Event, Runtime
from quire.units import round_up

Words = npt.NDArray[np.int32]

_ALIGNMENT = 4
"""Words; 16 bytes."""


class Staging:
    """Pinned buffers in turn, and their place on the device. All int32."""

    def __init__(self, runtime: Runtime, size: int, depth: int) -> None:
        """Allocates `depth` pinned buffers of `size` words."""
        self.size = size
        self.words = torch.zeros(size, dtype=torch.int32, device=runtime.device)
        """On the device."""
        self._pinned = [runtime.pinned(size, torch.int32) for _ in range(depth)]
        self._arrays = [buffer.numpy() for buffer in self._pinned]
        self._copied = [runtime.event() for _ in range(depth)]
        self._in_use = [False] * depth
        self._turn = 0
        self._used = 0

    def begin(self) -> None:
        """Takes the next pinned buffer, after its last copy is done."""
        self._turn = (self._turn + 1) % len(self._pinned)
        if self._in_use[self._turn]:
            self._copied[self._turn].synchronize()
            self._in_use[self._turn] = False
        self._used = 0

    @property
    def room(self) -> int:
        """Words that still fit, if they are put at most four times."""
        return self.size - self._used - 4 * _ALIGNMENT

    def put(self, values: npt.NDArray[np.integer], padded_size: int = 0, fill: int = 0) -> torch.Tensor:
        """Adds words, filled up to `padded_size` of them; returns where they will be on the device.

        The caller has made the buffers large enough.
        """
        count = max(len(values), padded_size)
        # Compiled kernels differ by whether a pointer is aligned: ours always is, so there is one of each.
        start, array = round_up(self._used, _ALIGNMENT), self._arrays[self._turn]
        array[start : start + len(values)] = values
        array[start + len(values) : start + count] = fill
        self._used = start + count
        return self.words[start : start + count]

    def send(self) -> None:
        """Copies what was put; the host does not wait."""
        if self._used:
            self.words[: self._used].copy_(self._pinned[self._turn][: self._used], non_blocking=True)
            self._copied[self._turn].record()
            self._in_use[self._turn] = True


class Returned:
    """The words of one step, sampled tokens first, on their way to the host."""

    def __init__(self, origin: WordReturn, buffer: torch.Tensor, count: int, event: Event) -> None:
        self._origin = origin
        self._buffer = buffer
        self._words = buffer[:count].numpy()
        self._event = event

    def wait(self) -> None:
        """Waits until the device has done the step. Any thread may wait."""
        self._event.synchronize()

    def take(self) -> Words:
        """Returns the words and gives the buffer back; call once, after `wait`."""
        self._words = self._words.copy()
        self._origin.give_back(self._buffer)
        return self._words

    def word(self, index: int) -> int:
        """Returns one word; waits for it."""
        self.wait()
        return int(self._words[index])


class WordReturn:
    """Brings sampled tokens, and what is reported of them, to the host: pinned buffers, an event a step in flight."""

    def __init__(self, runtime: Runtime, size: int) -> None:
        """Prepares for `size` words a step; buffers are made as steps in flight need them, longer ones for more."""
        self._runtime = runtime
        self._size = size
        self._spare: list[torch.Tensor] = []

    def send(self, *parts: torch.Tensor) -> Returned:
        """Starts the copy of int32 tensors, one behind the other; none mark the end of the work so far all the same."""
        count = sum(part.numel() for part in parts)
        buffer = self._buffer(count)
        start = 0
        for part in parts:
            if part.numel():
                buffer[start : start + part.numel()].view(part.shape).copy_(part, non_blocking=True)
            start += part.numel()
        event = self._runtime.event()
        event.record()
        return Returned(self, buffer, count, event)

    def _buffer(self, count: int) -> torch.Tensor:
        """Returns a buffer for at least `count` words."""
        for index, buffer in enumerate(self._spare):
            if len(buffer) >= count:
                return self._spare.pop(index)
        if self._spare:
            # A longer one takes its place: there are no more of them than steps in flight.
            self._spare.pop()
        size = self._size
        while size < count:
            size *= 2
        return self._runtime.pinned(size, torch.int32)

    def give_back(self, buffer: torch.Tensor) -> None:
        """Takes a buffer that was read."""
        self._spare.append(buffer)
