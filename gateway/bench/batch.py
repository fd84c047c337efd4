"""Sequences that decode, and the memory bookkeeping of their steps."""

from __future__ import annotations

from array import array
from collections import deque
import itertools
import os
import time

from gateway.core.lease import GrowthLease
from gateway.core.report import report, report_at
from gateway.core.request import Request, RequestSettings, SamplingSettings
from gateway.core.scheduler import Scheduler
from gateway.core.sequence import Sequence
from gateway.core.step import StepDraft, StepOutcome
from memsvc.bench.samples import Samples
from quire.memory import AdmitRequest, JournalEntry, Memory, PoolInfo

_PROMPT_BLOCKS = 4
_TOKEN = 7


def make_sequence(name: str, prompt_length: int, max_model_len: int) -> Sequence:
    """Returns a sequence with a prompt that nobody has seen, which decodes as long as the model allows."""
    prompt = array("I", os.urandom(4 * prompt_length))
    settings = RequestSettings(name, "model", prompt, max_model_len, SamplingSettings())
    return Request(settings, max_model_len, 0.0).samples[0]


class DecodeBatch:
    """Running sequences, phase-shifted so that in every step 1 of block_size needs a block and as many fill one.

    What is timed, `step`, is the memory bookkeeping of one decode step: finding the sequences whose next token has no
    block and those whose block is full (`scan`), giving the former a block of the gateway's lease, building the journal
    entry (with the scheduler's own `report`, for each block that filled), and handing it to `Memory.journal`. In this
    process that call applies it; over gRPC it enters the outbox, and `acknowledged` goes on until memsvc has applied it
    and the gateway has heard so. Sampling, plans and text are not memory's. As on a lane, two steps are in flight: the
    next step is planned, growth and all, before the result of the one before it is taken in.

    Args:
        memory: where the journal goes.
        pool: the pool.
        running: sequences that decode in each step.
        shifted: of these, how many have evenly shifted phases; the others are all in mid-block for the first
            `quiet_step_count` of each block_size steps.
    """

    def __init__(self, memory: Memory, pool: PoolInfo, running: int, shifted: int | None = None) -> None:
        self._memory = memory
        self._pool = pool
        self._size = pool.spec.block_size
        self._count = running
        self._shifted = running if shifted is None else shifted
        self.quiet_step_count = self._size if self._shifted == running else self._size - 4
        self.lease = GrowthLease(pool.spec.usable_block_count)
        self.sequences: list[Sequence] = []

    async def start(self) -> None:
        """Admits all sequences, has their prompts written, and decodes a block of each."""
        entry = JournalEntry(self._pool.pool_id, self._pool.epoch)
        for index in range(self._count):
            phase = index % self._size if index < self._shifted else 2
            sequence = make_sequence(f"s{index}", _PROMPT_BLOCKS * self._size + phase, self._pool.spec.max_model_len)
            await admit(self._memory, self._pool, sequence)
            sequence.computed = sequence.scheduled = len(sequence.tokens)
            sequence.tokens.append(_TOKEN)
            sequence.room = len(sequence.blocks) * self._size
            report(sequence, entry)
            sequence.report_at = report_at(sequence, self._size)
            self.sequences.append(sequence)
        await refill(self._memory, self._pool, self.lease, self._count)
        for sequence in self.sequences:
            if sequence.scheduled == sequence.room:
                self._grow(sequence, entry)
            sequence.scheduled += 1
        self._memory.journal(entry)
        await self.steps(self._size)
        await self._memory.flush()

    async def steps(self, count: int, *, acknowledged: bool = False) -> Samples:
        """Times `count` steps, or as many of them as are quiet.

        Args:
            count: steps.
            acknowledged: also wait for memsvc's acknowledgement of each, and time until then.
        """
        samples: Samples = {"step": [], "scan": [], "handed_over": []}
        for number in range(count):
            await refill(self._memory, self._pool, self.lease, self._count)
            for sequence in self.sequences:
                sequence.computed += 1
                sequence.tokens.append(_TOKEN)
            begun = time.perf_counter()
            growing, filled = self._scan()
            scanned = time.perf_counter()
            self._memory.journal(self._entry(growing, filled))
            handed = time.perf_counter()
            if acknowledged:
                await self._memory.flush()
            ended = time.perf_counter()
            if number % self._size < self.quiet_step_count:
                samples["step"].append(ended - begun)
                samples["scan"].append(scanned - begun)
                samples["handed_over"].append(handed - begun)
            for sequence in self.sequences:
                sequence.scheduled += 1
        return samples

    def _scan(self) -> tuple[list[Sequence], list[Sequence]]:
        """Returns the sequences whose next token has no block, and those that have filled theirs."""
        growing = [sequence for sequence in self.sequences if sequence.scheduled == sequence.room]
        filled = [sequence for sequence in self.sequences if sequence.computed >= sequence.report_at]
        return growing, filled

    def _grow(self, sequence: Sequence, entry: JournalEntry) -> None:
        """Gives a sequence a block of the lease."""
        block = self.lease.take()
        assert block is not None
        entry.appended += (sequence.table, len(sequence.blocks), block)
        sequence.blocks.append(block)
        sequence.room += self._size

    def _entry(self, growing: list[Sequence], filled: list[Sequence]) -> JournalEntry:
        """Returns the journal of the step; takes the blocks from the lease."""
        entry = JournalEntry(self._pool.pool_id, self._pool.epoch)
        for sequence in growing:
            self._grow(sequence, entry)
        for sequence in filled:
            report(sequence, entry)
            sequence.report_at = report_at(sequence, self._size)
        return entry


class SchedulerSteps:
    """Whole steps of the real scheduler: `schedule`, `update` with a result, and `Memory.journal`.

    More than memory's part: the step's plan is drawn up and its tokens are taken in. Nothing is encoded or sent. Two
    steps are in flight, as on a lane.

    Args:
        memory: where the journal goes.
        pool: the pool.
        running: sequences that decode in each step.
    """

    def __init__(self, memory: Memory, pool: PoolInfo, running: int) -> None:
        self._memory = memory
        self._pool = pool
        self._count = running
        budget = 2 * running * (_PROMPT_BLOCKS + 1) * pool.spec.block_size
        self._scheduler = Scheduler(pool, running, budget, max_preemptions=8)
        self._known: dict[int, int] = {}
        self._computed: dict[int, int] = {}
        self._in_flight: deque[StepDraft] = deque()
        self.entries: list[JournalEntry] = []

    async def start(self) -> None:
        """Admits all sequences, runs their prompts, and decodes a block of each."""
        for index in range(self._count):
            length = _PROMPT_BLOCKS * self._pool.spec.block_size + index % self._pool.spec.block_size
            sequence = make_sequence(f"w{index}", length, self._pool.spec.max_model_len)
            admission = await self._memory.admit(admit_request(self._pool, sequence))
            self._scheduler.start(sequence, admission)
            self._known[sequence.table] = length
            self._computed[sequence.table] = 0
        self._in_flight.append(self._scheduler.schedule())
        await self.steps(self._pool.spec.block_size + 1)

    async def steps(self, count: int) -> Samples:
        """Times `count` steps."""
        return {"scheduler_step": [await self._step() for _ in range(count)]}

    async def _step(self) -> float:
        """Runs one step and returns the seconds that it took; keeps its journal entry."""
        await refill(self._memory, self._pool, self._scheduler.lease, self._count)
        begun = time.perf_counter()
        draft = self._scheduler.schedule()
        planned = time.perf_counter()
        self._in_flight.append(draft)
        outcome = self._run(self._in_flight.popleft())
        computed = time.perf_counter()
        entry = self._scheduler.update(outcome).journal
        entry.appended = draft.appended + entry.appended
        self._memory.journal(entry)
        self.entries = [*self.entries[-63:], entry]
        return time.perf_counter() - computed + planned - begun

    def _run(self, draft: StepDraft) -> StepOutcome:
        """Returns the result of an executor that takes no time; every sequence samples the same token."""
        written = []
        for table, count in zip(draft.scheduled_tables, draft.scheduled_counts, strict=True):
            self._computed[table] += count
            written.append(self._computed[table])
        tokens = list(itertools.repeat(_TOKEN, len(written)))
        return StepOutcome(draft.scheduled_tables, written, list(draft.scheduled_tables), tokens, draft.removed, [])


def admit_request(pool: PoolInfo, sequence: Sequence) -> AdmitRequest:
    """Returns the admission of a sequence that shares nothing."""
    return AdmitRequest(
        pool.pool_id,
        pool.epoch,
        sequence.request.settings.request_id,
        0,
        sequence.tokens.tobytes(),
        skip_cache_read=True,
    )


async def admit(memory: Memory, pool: PoolInfo, sequence: Sequence) -> None:
    """Opens the table of a sequence."""
    admission = await memory.admit(admit_request(pool, sequence))
    sequence.table, sequence.epoch = admission.table, admission.epoch
    sequence.blocks = list(admission.block_ids)
    sequence.reported = len(sequence.tokens)


async def refill(memory: Memory, pool: PoolInfo, lease: GrowthLease, running: int) -> None:
    """Brings the lease to a step's need of blocks for all that run, as the lane does beside the steps."""
    if len(lease) < running:
        asked = max(running, pool.spec.block_size * running // 4)
        lease.refilled(await memory.lease(pool.pool_id, pool.epoch, lease.granted_total + asked), asked)
