"""Counts what a steady-state decode run awaits of the memory service, on the gateway's own lane."""

from __future__ import annotations

import asyncio
from collections import Counter
import dataclasses

from gateway.bench.batch import make_sequence
from gateway.config import GatewayConfig
from gateway.core.queue import WaitingQueue
from gateway.core.sequence import Sequence
from gateway.core.step import LogprobRow
from gateway.lane import Lane
from gateway.tokenize import TokenizerFiles
from protos.execsvc.v1 import execsvc_pb2 as pb
from quire import columns
from quire.errors import QuireError
from quire.memory import (
    Admission,
    AdmitRequest,
    CloseReason,
    Fork,
    ForkRequest,
    JournalEntry,
    Memory,
    MemoryListener,
    PoolInfo,
)

STEP_SECONDS = 0.002
"""A decode step of a small model on a fast device: the less it takes, the less time there is to refill a lease."""
_BUDGET = 1 << 20
_TOKEN = 7
_WARM_UP_BLOCKS = 2
_SECONDS = 60.0


@dataclasses.dataclass(frozen=True, slots=True)
class SteadyRun:
    """What happened in the counted steps of a steady-state run, in which every sequence decodes one token a step."""

    step_count: int
    awaited_count: int
    """Calls of `admit`, `lease` and `flush` that the step loop itself awaited."""
    stalled_count: int
    """Times that a sequence sat a step out because a block was not there yet: a wait for memory by another name."""
    lease_count: int
    """Calls of `lease` made beside the steps."""
    journal_count: int
    """Journal entries, which nobody waits for."""

    @property
    def awaited_per_step(self) -> float:
        """Waits for memory, of either kind, a step."""
        return round((self.awaited_count + self.stalled_count) / self.step_count, 6)


class CountingMemory:
    """`quire.memory.Memory` that passes everything on and counts calls, by method and by the task that makes them."""

    def __init__(self, memory: Memory) -> None:
        """Wraps `memory`."""
        self._memory = memory
        self.calls: Counter[tuple[str, str]] = Counter()

    def clear(self) -> None:
        """Begins to count anew."""
        self.calls.clear()

    def count(self, method: str, *, task: str | None = None) -> int:
        """Returns how often `method` was called, by any task or by those whose name begins with `task`."""
        return sum(
            number
            for (name, caller), number in self.calls.items()
            if name == method and (task is None or caller.startswith(task))
        )

    def _note(self, method: str) -> None:
        task = asyncio.current_task()
        self.calls[method, task.get_name() if task is not None else ""] += 1

    @property
    def gateway_incarnation(self) -> int:
        """See Memory."""
        return self._memory.gateway_incarnation

    async def start(self, listener: MemoryListener) -> None:
        """See Memory."""
        await self._memory.start(listener)

    async def close(self) -> None:
        """See Memory."""
        await self._memory.close()

    async def admit(self, request: AdmitRequest) -> Admission:
        """See Memory."""
        self._note("admit")
        return await self._memory.admit(request)

    async def fork(self, request: ForkRequest) -> Fork:
        """See Memory."""
        self._note("fork")
        return await self._memory.fork(request)

    async def lease(self, pool_id: str, epoch: int, granted_total: int) -> list[int]:
        """See Memory."""
        self._note("lease")
        return await self._memory.lease(pool_id, epoch, granted_total)

    def journal(self, entry: JournalEntry) -> None:
        """See Memory."""
        self._note("journal")
        self._memory.journal(entry)

    async def flush(self) -> None:
        """See Memory."""
        self._note("flush")
        await self._memory.flush()


class EchoExecutor:
    """`gateway.clients.executor.ExecutorLink` without a model: a step samples the same token for every sequence.

    Args:
        pool: the pool whose executor it is.
        max_num_seqs: most sequences.
        step_seconds: time that a step takes; steps run one after the other, as on a device.
    """

    def __init__(self, pool: PoolInfo, max_num_seqs: int, step_seconds: float = STEP_SECONDS) -> None:
        self._pool = pool
        self._step_seconds = step_seconds
        self._device = asyncio.Lock()
        self._max_num_seqs = max_num_seqs
        self._known: dict[int, int] = {}
        self._computed: dict[int, int] = {}

    async def describe(self) -> pb.DescribeResponse:
        """See ExecutorLink."""
        return pb.DescribeResponse(
            executor_id=self._pool.pool_id,
            executor_incarnation=self._pool.executor_incarnation,
            ready=True,
            max_num_batched_tokens=_BUDGET,
            max_num_seqs=self._max_num_seqs,
        )

    async def tokenizer(self) -> TokenizerFiles:
        """See ExecutorLink."""
        raise QuireError("this executor has no tokenizer")

    async def open(self, request: pb.Open) -> pb.Opened:
        """See ExecutorLink."""
        return pb.Opened(epoch=request.epoch)

    async def run(self, plan: pb.StepPlan) -> pb.StepResult:
        """See ExecutorLink."""
        async with self._device:
            await asyncio.sleep(self._step_seconds)
            return self._run(plan)

    def _run(self, plan: pb.StepPlan) -> pb.StepResult:
        for start in plan.added:
            self._known[start.table] = len(start.token_ids) // 4
            self._computed[start.table] = start.computed_token_count
        removed = columns.unpack_list(plan.removed, "removed")
        tables = columns.unpack_list(plan.scheduled_tables, "scheduled_tables")
        counts = columns.unpack_list(plan.scheduled_counts, "scheduled_counts", row_count=len(tables))
        sampled = []
        for table, count in zip(tables, counts, strict=True):
            self._computed[table] += count
            if self._computed[table] == self._known[table]:
                self._known[table] += 1
                sampled.append(table)
        return pb.StepResult(
            step=plan.step,
            written_tables=columns.pack(tables),
            written_counts=columns.pack([self._computed[table] for table in tables]),
            sampled_tables=columns.pack(sampled),
            sampled_tokens=columns.pack([_TOKEN] * len(sampled)),
            fenced=columns.pack(removed),
        )

    async def close(self) -> None:
        """See ExecutorLink."""


class _Owner:
    """`gateway.lane.LaneOwner` for sequences that never end: counts their tokens."""

    def __init__(self, queue: WaitingQueue) -> None:
        self._queue = queue
        self.token_count = 0
        self.admitted_count = 0
        self.defect = ""
        self.changed = asyncio.Event()

    async def model_queue(self, link: object, description: pb.DescribeResponse, pool: PoolInfo) -> WaitingQueue:
        return self._queue

    def session_ended(self, pool_id: str) -> None:
        pass

    def fatal(self, reason: str) -> None:
        self.defect = reason
        self.changed.set()

    def admitted(self, sequence: Sequence) -> None:
        self.admitted_count += 1
        self.changed.set()

    def logprobs(self, sequence: Sequence, row: LogprobRow) -> None:
        pass

    def token(self, sequence: Sequence, token: int) -> bool:
        self.token_count += 1
        self.changed.set()
        return False

    def take_forks(self) -> list[tuple[Sequence, list[Sequence]]]:
        return []

    def released(self, sequence: Sequence) -> None:
        pass

    def failed(self, sequence: Sequence, error: QuireError) -> None:
        self.fatal(error.message)

    async def wait_for_tokens(self, count: int) -> None:
        """Waits until so many tokens were sampled.

        Raises:
            QuireError: the lane failed.
        """
        while self.token_count < count:
            self.changed.clear()
            await self.changed.wait()
            if self.defect:
                raise QuireError(f"the lane failed: {self.defect}")


async def count_steady_run(memory: Memory, pool: PoolInfo, running: int, step_count: int) -> SteadyRun:
    """Runs `running` sequences on a real lane until all decode, then counts over `step_count` steps.

    Args:
        memory: a started memory.
        pool: a pool with room for all of it.
        running: sequences.
        step_count: steps to count over, at least; each decodes one token of each sequence.

    Raises:
        QuireError: the lane failed.
        TimeoutError: it took too long.
    """
    counting = CountingMemory(memory)
    queue = WaitingQueue(running)
    owner = _Owner(queue)
    config = GatewayConfig(gateway_id="bench", max_num_seqs=running)
    lane = Lane(pool, lambda _address: EchoExecutor(pool, running), counting, owner, config)
    sequences = []
    for index in range(running):
        sequence = make_sequence(f"c{index}", 2 * pool.spec.block_size + index % pool.spec.block_size, 1 << 16)
        queue.push_request(sequence.request)
        sequences.append(sequence)
    await lane.restart(pool)
    try:
        async with asyncio.timeout(_SECONDS):
            while owner.admitted_count < running:
                await owner.wait_for_tokens(owner.token_count + 1)
            await owner.wait_for_tokens(owner.token_count + running * _WARM_UP_BLOCKS * pool.spec.block_size)
            scheduler = lane.scheduler
            if scheduler is None:
                raise QuireError("the lane lost its session")
            counting.clear()
            steps, stalled = scheduler.stats.step_count, scheduler.stats.stalled_count
            await owner.wait_for_tokens(owner.token_count + running * step_count)
            loop_task = f"lane-{pool.pool_id}"
            return SteadyRun(
                step_count=scheduler.stats.step_count - steps,
                awaited_count=sum(counting.count(name, task=loop_task) for name in ("admit", "lease", "flush")),
                stalled_count=scheduler.stats.stalled_count - stalled,
                lease_count=counting.count("lease"),
                journal_count=counting.count("journal"),
            )
    finally:
        for sequence in sequences:
            lane.finish(sequence, CloseReason.CANCELLED)
        await lane.stop()
