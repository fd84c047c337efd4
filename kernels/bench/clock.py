"""Seconds on a CUDA device."""

from collections.abc import Callable
import dataclasses
import statistics
from typing import Protocol

import torch

ROUNDS = 21
_FLUSH_BYTES = 2**28
"""More than any second-level cache holds."""
_COPY_BYTES = 2**30
_MATMUL_SIZE = 8192


@dataclasses.dataclass(frozen=True, slots=True)
class Spread:
    """What the rounds took, in seconds."""

    median: float
    low: float
    """10 % of the rounds took less."""
    high: float
    """10 % took more."""


class Clock(Protocol):
    """Measures what work takes."""

    def time(self, work: Callable[[], object]) -> Spread:
        """Runs `work` several times and returns what a run takes."""
        ...


class CudaClock:
    """Times replays of a captured graph, between events, with a cold cache before each."""

    def __init__(self, rounds: int = ROUNDS) -> None:
        """Takes `rounds` samples of each piece of work."""
        self._rounds = rounds
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def time(self, work: Callable[[], object]) -> Spread:
        """See Clock. Work that cannot be captured is launched from here, which counts, too."""
        run = self._captured(work)
        samples = []
        for _ in range(self._rounds + 1):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            self._flush.fill_(1)
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            samples.append(begin.elapsed_time(end) / 1e3)
        deciles = statistics.quantiles(samples[1:], n=10)
        return Spread(statistics.median(samples[1:]), deciles[0], deciles[-1])

    def _captured(self, work: Callable[[], object]) -> Callable[[], object]:
        """Returns a replay of `work`; `work` itself if it waits for the device."""
        for _ in range(3):
            work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                work()
        except RuntimeError:
            torch.cuda.synchronize()
            return work
        return graph.replay


def ceilings(clock: Clock, device: torch.device, *, scale: int = 1) -> dict[str, float]:
    """Returns bytes a second of a large copy and FLOP a second of a large bfloat16 product, as measured.

    Args:
        clock: to measure with.
        device: to measure on.
        scale: divisor of the sizes, for a dry run.
    """
    source = torch.ones(_COPY_BYTES // scale, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copying = clock.time(lambda: target.copy_(source)).median
    size = max(16, _MATMUL_SIZE // scale)
    left = torch.randn(size, size, device=device).to(torch.bfloat16)
    out = torch.empty_like(left)
    multiplying = clock.time(lambda: torch.mm(left, left, out=out)).median
    return {
        "copy_bytes_per_second": 2 * source.numel() / copying,
        "matmul_flops": 2 * size**3 / multiplying,
    }
