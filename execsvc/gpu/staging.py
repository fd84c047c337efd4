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


class ReturnedTokens:
    """The tokens of one step on their way to the host."""

    def __init__(self, origin: TokenReturn, buffer: torch.Tensor, count: int, event: Event) -> None:
        self._origin = origin
        self._buffer = buffer
        self._count = count
        self._event = event

    def wait(self) -> None:
        """Waits until the device has done the step. Any thread may wait."""
        self._event.synchronize()

    def take(self) -> list[int]:
        """Returns the tokens and gives the buffer back; call once, after `wait`."""
        tokens: list[int] = self._buffer[: self._count].tolist()
        self._origin.give_back(self._buffer)
        return tokens


class TokenReturn:
    """Brings sampled tokens to the host: a pinned buffer and an event for each step in flight."""

    def __init__(self, runtime: Runtime, size: int) -> None:
        """Prepares for at most `size` tokens a step; buffers are made as steps in flight need them."""
        self._runtime = runtime
        self._size = size
        self._spare: list[torch.Tensor] = []

    def send(self, tokens: torch.Tensor) -> ReturnedTokens:
        """Starts the copy of `tokens` `[sample]` int32; none of them mark the end of the work so far all the same."""
        buffer = self._spare.pop() if self._spare else self._runtime.pinned(self._size, torch.int32)
        count = len(tokens)
        if count:
            buffer[:count].copy_(tokens, non_blocking=True)
        event = self._runtime.event()
        event.record()
        return ReturnedTokens(self, buffer, count, event)

    def give_back(self, buffer: torch.Tensor) -> None:
        """Takes a buffer that was read."""
        self._spare.append(buffer)
