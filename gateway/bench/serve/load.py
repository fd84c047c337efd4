"""The load itself: when each request is sent, and that no more are under way than allowed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
import contextlib
import dataclasses
import math
import time

import numpy as np
import numpy.typing as npt

from gateway.bench.serve.backends import Backend
from gateway.bench.serve.record import Record
from gateway.simulate.workload import Workload

_SCATTER = np.uint64(2_654_435_761)
_PROGRESS_SECONDS = 0.2


@dataclasses.dataclass(frozen=True, slots=True)
class Pace:
    """When requests are sent.

    Attributes:
        rate: requests a second, on average; infinite for all at once.
        burstiness: shape of the gamma distribution of the gaps: 1 is Poisson, less is burstier.
        concurrency: most requests under way; 0 for no limit. Those beyond wait at the client, as people in a closed
            loop do, and their times begin when they are sent.
        replay: send at the times of the trace, `rate` aside.
        seed: the same seed draws the same gaps.
    """

    rate: float = math.inf
    burstiness: float = 1.0
    concurrency: int = 0
    replay: bool = False
    seed: int = 0

    def times(self, workload: Workload) -> npt.NDArray[np.float64]:
        """Returns when each request is due, in seconds."""
        if self.replay:
            return workload.arrivals
        count = len(workload)
        if math.isinf(self.rate):
            return np.zeros(count)
        gaps = np.random.default_rng(self.seed).gamma(self.burstiness, 1 / (self.rate * self.burstiness), count)
        due: npt.NDArray[np.float64] = np.cumsum(gaps) - gaps[0]
        return due


@dataclasses.dataclass(slots=True)
class Counts:
    """How far a load is."""

    total: int
    sent: int = 0
    done: int = 0
    failed: int = 0
    token_count: int = 0

    @property
    def running(self) -> int:
        """Requests under way."""
        return self.sent - self.done


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """What a load gave."""

    records: list[Record]
    seconds: float
    lateness_seconds: float
    """The longest that a request began after it was due, the wait for its turn aside: what the client itself lost."""
    skipped_count: int
    """Requests that do not fit the model."""


def prompt_tokens(workload: Workload, index: int, vocab_size: int) -> list[int]:
    """Returns a prompt of the workload in a model's vocabulary: equal where the workload's prompts are."""
    if workload.hash_ids is None:
        # A small vocabulary has not as many first tokens as there are prompts.
        drawn: list[int] = (
            np.random.default_rng(index).integers(vocab_size, size=workload.prompt_lengths[index]).tolist()
        )
        return drawn
    scattered = workload.prompt(index).astype(np.uint64) * _SCATTER >> np.uint64(7)
    tokens: list[int] = (scattered % np.uint64(vocab_size)).tolist()
    return tokens


async def run_load(
    backend: Backend, workload: Workload, pace: Pace, progress: Callable[[Counts], None] = lambda _: None
) -> Result:
    """Sends every request of a workload that fits the model, and waits for all of them.

    Args:
        backend: an open endpoint.
        workload: requests.
        pace: when to send them.
        progress: hears how far it is, some times a second.
    """
    longest = backend.max_model_len or math.inf
    lengths = (workload.prompt_lengths + workload.output_lengths).tolist()
    fitting = [index for index, length in enumerate(lengths) if length <= longest]
    counts = Counts(len(fitting))
    turns = asyncio.Semaphore(pace.concurrency) if pace.concurrency else contextlib.nullcontext()
    begun = time.perf_counter()

    def clock() -> float:
        return time.perf_counter() - begun

    async def report() -> None:
        while True:
            progress(counts)
            await asyncio.sleep(_PROGRESS_SECONDS)

    reporter = asyncio.create_task(report(), name="progress")
    try:
        records, lateness = await _send_all(backend, workload, pace.times(workload), fitting, turns, counts, clock)
    finally:
        reporter.cancel()
        await asyncio.gather(reporter, return_exceptions=True)
    progress(counts)
    return Result(records, clock(), lateness, len(workload) - len(fitting))


async def _send_all(
    backend: Backend,
    workload: Workload,
    due: npt.NDArray[np.float64],
    indexes: Iterable[int],
    turns: contextlib.AbstractAsyncContextManager[None],
    counts: Counts,
    clock: Callable[[], float],
) -> tuple[list[Record], float]:
    """Returns the records in the order of sending, and the greatest lateness."""
    records: list[Record] = []
    lateness = 0.0

    async def send(index: int, prompt: list[int]) -> None:
        async with turns:
            record = Record(index, len(prompt), clock())
            records.append(record)
            counts.sent += 1
            await backend.generate(record, prompt, int(workload.output_lengths[index]), clock)
            counts.done += 1
            counts.failed += bool(record.failure)
            counts.token_count += record.token_count

    async with asyncio.TaskGroup() as group:
        for index in indexes:
            # Made before it is due: a long prompt takes a while.
            prompt = prompt_tokens(workload, index, backend.vocab_size)
            wait = float(due[index]) - clock()
            # Also when it is late: those that were sent have to begin.
            await asyncio.sleep(max(0.0, wait))
            lateness = max(lateness, clock() - float(due[index]) if due[index] else 0.0)
            group.create_task(send(index, prompt))
    return records, lateness
