"""Plans that keep an engine busy in one way, and how long their steps take.

Decoding starts at a context that nobody computed: blocks hold zeros, lengths and traffic are those of the real thing. A
second step is always submitted before the first one's tokens are taken, as gateways do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
import dataclasses
import itertools
import statistics
import time
from typing import Any

from execsvc.engine import Engine, PendingStep
from protos.execsvc.v1 import execsvc_pb2 as pb
from quire import columns
from quire.errors import InvariantError
from quire.units import div_ceil

_DEPTH = 2
_TOKEN = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of steps, or of runs."""

    median: float
    low: float
    """The tenth percentile."""
    high: float
    """The ninetieth."""

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        """Returns the timing of two samples or more."""
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(statistics.median(samples), deciles[0], deciles[-1])


class Bench:
    """Runs plans on an engine that nobody else uses."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._step = 0
        self._tables = 0
        engine.begin_epoch(engine.epoch + 1)

    def fits(self, batch: int, context: int, steps: int) -> bool:
        """Returns whether the cache and the longest sequence allow a decode."""
        engine = self._engine
        length = context + steps + 1
        return length <= engine.max_model_len and batch * div_ceil(length, engine.block_size) < engine.block_count

    def decode(self, batch: int, context: int, warmup: int, steps: int) -> tuple[Timing, Timing]:
        """Returns (seconds from one finished step to the next, seconds of the host in submit and collect).

        Args:
            batch: sequences that decode.
            context: tokens that each of them has at the start.
            warmup: steps that are not counted.
            steps: steps that are.
        """
        tables = self._open(batch, context, context - 1, warmup + steps)
        scheduled, ones = columns.pack(tables), columns.pack([1] * batch)
        flying: deque[tuple[PendingStep, float]] = deque()
        finished: list[float] = []
        host: list[float] = []
        for number in range(warmup + steps + _DEPTH - 1):
            if number < warmup + steps:
                plan = self._plan(scheduled_tables=scheduled, scheduled_counts=ones)
                started = time.perf_counter()
                pending = self._engine.submit(plan)
                flying.append((pending, time.perf_counter() - started))
            if len(flying) == _DEPTH or number >= warmup + steps:
                pending, submitting = flying.popleft()
                pending.wait()
                finished.append(time.perf_counter())
                self._take(pending)
                host.append(submitting + time.perf_counter() - finished[-1])
        self._engine.drop_all()
        gaps = [later - earlier for earlier, later in itertools.pairwise(finished)]
        return Timing.of(gaps[warmup:]), Timing.of(host[warmup:])

    def prefill(self, length: int, rounds: int) -> Timing:
        """Returns the seconds in which a prompt of `length` tokens is computed, in as few steps as it can be."""
        samples: list[float] = []
        for _ in range(rounds + 1):
            (table,) = self._open(1, length, 0, 1)
            started = time.perf_counter()
            pending = [
                self._engine.submit(
                    self._plan(scheduled_tables=columns.pack([table]), scheduled_counts=columns.pack([count]))
                )
                for count in self._chunks(length)
            ]
            pending[-1].wait()
            samples.append(time.perf_counter() - started)
            for step in pending:
                step.wait()
                self._take(step)
            self._engine.drop_all()
        return Timing.of(samples[1:])

    def serve(self, count: int, prompt: int, output: int) -> float:
        """Returns the seconds in which `count` prompts are computed and `output` tokens of each are generated."""
        tables = self._open(count, prompt, 0, output)
        started = time.perf_counter()
        flying: deque[PendingStep] = deque()
        for plan in self._serving_plans(tables, prompt, output):
            flying.append(self._engine.submit(plan))
            if len(flying) == _DEPTH:
                self._finish(flying.popleft())
        while flying:
            self._finish(flying.popleft())
        seconds = time.perf_counter() - started
        self._engine.drop_all()
        return seconds

    def _serving_plans(self, tables: list[int], prompt: int, output: int) -> Iterator[pb.StepPlan]:
        """Yields the plans of `serve`: prompts, as many tokens in a step as it may have, then one token of each."""
        left = dict.fromkeys(tables, prompt)
        while left:
            room, counts = self._engine.max_num_batched_tokens, {}
            for table, count in left.items():
                if room:
                    counts[table] = min(room, count)
                    room -= counts[table]
            left = {table: rest for table, count in left.items() if (rest := count - counts.get(table, 0))}
            yield self._plan(scheduled_tables=columns.pack(counts), scheduled_counts=columns.pack(counts.values()))
        ones = columns.pack([1] * len(tables))
        for _ in range(output - 1):
            yield self._plan(scheduled_tables=columns.pack(tables), scheduled_counts=ones)

    def _finish(self, pending: PendingStep) -> None:
        pending.wait()
        self._take(pending)

    def _chunks(self, length: int) -> list[int]:
        most = self._engine.max_num_batched_tokens
        return [min(most, length - start) for start in range(0, length, most)]

    def _open(self, count: int, length: int, computed: int, steps: int) -> list[int]:
        """Adds sequences of `length` tokens with blocks for `steps` more; returns their tables."""
        blocks = div_ceil(length + steps + 1, self._engine.block_size)
        plan, tokens = self._plan(), columns.pack([_TOKEN] * length)
        tables = []
        for index in range(count):
            self._tables += 1
            first = 1 + index * blocks
            plan.added.add(
                table=self._tables,
                token_ids=tokens,
                block_ids=columns.pack(range(first, first + blocks)),
                computed_token_count=computed,
                sampling=pb.SamplingParams(top_p=1.0),
            )
            tables.append(self._tables)
        pending = self._engine.submit(plan)
        pending.wait()
        self._take(pending)
        return tables

    def _plan(self, **fields: Any) -> pb.StepPlan:
        self._step += 1
        return pb.StepPlan(step=self._step, epoch=self._engine.epoch, **fields)

    def _take(self, pending: PendingStep) -> None:
        """Takes the result of a step; raises InvariantError if the engine refused its plan."""
        result = self._engine.collect(pending)
        if result.errors:
            raise InvariantError(f"a step of the measurement failed: {result.errors[0].message}")
