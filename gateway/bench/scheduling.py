"""Whole steps of the scheduler with an executor that takes no time, and what each part of a step costs."""

from __future__ import annotations

from collections import deque
import time

from gateway.bench.batch import admit_request, make_sequence
from gateway.core.scheduler import Scheduler
from gateway.plan import to_outcome, to_plan
from memsvc.bench.samples import Samples
from protos.execsvc.v1 import execsvc_pb2 as pb
from quire import columns
from quire.memory import Memory, PoolInfo

PROMPT_BLOCKS = 4
TOKEN = 7
_DEPTH = 2


class NullDevice:
    """What an executor answers that has no model: every sequence whose tokens are computed samples the same one.

    The columns of a plan in, the columns of its result out; a step costs it what numpy takes.
    """

    def __init__(self) -> None:
        """Starts without a sequence."""
        self._known: dict[int, int] = {}
        self._computed: dict[int, int] = {}

    def run(self, plan: pb.StepPlan) -> pb.StepResult:
        """Applies one plan."""
        known, computed = self._known, self._computed
        for start in plan.added:
            known[start.table] = len(start.token_ids) // columns.U32_BYTES
            computed[start.table] = start.computed_token_count
        tables = columns.unpack_list(plan.scheduled_tables, "scheduled_tables")
        counts = columns.unpack_list(plan.scheduled_counts, "scheduled_counts", row_count=len(tables))
        sampled, written = [], []
        for table, count in zip(tables, counts, strict=True):
            computed[table] = done = computed[table] + count
            written.append(done)
            if done == known[table]:
                known[table] = done + 1
                sampled.append(table)
        for table in columns.unpack_list(plan.removed, "removed"):
            known.pop(table, None)
            computed.pop(table, None)
        return pb.StepResult(
            step=plan.step,
            written_tables=plan.scheduled_tables,
            written_counts=columns.pack(written),
            sampled_tables=plan.scheduled_tables if len(sampled) == len(tables) else columns.pack(sampled),
            sampled_tokens=columns.pack([TOKEN] * len(sampled)),
            fenced=plan.removed,
        )


class LoopSteps:
    """What a lane does between two results, without a socket, for sequences that decode.

    A step is `schedule` with growth from the lease, `update` with the result, the question whether each token ends its
    sequence, and the journal applied by a memory in this process: full blocks are hashed and published in it. That is
    what other engines call schedule and update. The plan's and the result's encoding is beside it. Lengths are
    shifted, so that in every step 1 sequence of block_size needs a block and as many fill one; two steps are in flight.

    Processor time is counted, so that what else runs on the machine does not come in.

    Args:
        memory: a started memory in this process.
        pool: its pool.
        running: sequences that decode in each step.
    """

    def __init__(self, memory: Memory, pool: PoolInfo, running: int) -> None:
        self._memory = memory
        self._pool = pool
        self._count = running
        budget = running * (PROMPT_BLOCKS + 1) * pool.spec.block_size
        self._scheduler = Scheduler(pool, running, budget, max_preemptions=8)
        self._device = NullDevice()
        self._in_flight: deque[pb.StepResult] = deque()
        self._appended: list[int] = []
        self._stop_tokens: dict[str, frozenset[int]] = {}
        self._step_no = 0

    async def start(self) -> None:
        """Admits all sequences, runs their prompts, and decodes two blocks of each."""
        size = self._pool.spec.block_size
        for index in range(self._count):
            sequence = make_sequence(f"w{index}", PROMPT_BLOCKS * size + index % size, self._pool.spec.max_model_len)
            settings = sequence.request.settings
            self._stop_tokens[settings.request_id] = settings.eos_token_ids | settings.stop_token_ids
            self._scheduler.start(sequence, await self._memory.admit(admit_request(self._pool, sequence)))
        await self.steps(2 * size)

    async def steps(self, count: int) -> Samples:
        """Times `count` steps; samples are named by part, the whole one is `schedule_and_update`."""
        samples: Samples = {}
        for _ in range(count):
            for name, seconds in (await self._step()).items():
                samples.setdefault(name, []).append(seconds)
        return samples

    async def _step(self) -> dict[str, float]:
        lease = self._scheduler.lease
        wanted = self._scheduler.blocks_wanted()
        if wanted:
            granted = await self._memory.lease(self._pool.pool_id, self._pool.epoch, lease.granted_total + wanted)
            lease.refilled(granted, wanted)
        begun = time.thread_time()
        draft = self._scheduler.schedule()
        planned = time.thread_time()
        self._step_no += 1
        plan = to_plan(draft, self._step_no, self._pool.epoch)
        encoded = time.thread_time()
        self._in_flight.append(self._device.run(plan))
        self._appended += draft.appended
        if len(self._in_flight) < _DEPTH:
            return {}
        result = self._in_flight.popleft()
        arrived = time.thread_time()
        outcome = to_outcome(result)
        decoded = time.thread_time()
        update = self._scheduler.update(outcome)
        updated = time.thread_time()
        for sequence, token in update.tokens:
            # As the gateway asks it: by the request's id, and no further for a token that ends nothing.
            stop_tokens = self._stop_tokens[sequence.request.settings.request_id]
            if token in stop_tokens or len(sequence.tokens) >= sequence.length_limit:
                raise AssertionError("a sequence that never ends has ended")
        asked = time.thread_time()
        update.journal.appended, self._appended = self._appended, []
        self._memory.journal(update.journal)
        ended = time.thread_time()
        return {
            "schedule": planned - begun,
            "update": updated - decoded,
            "stops": asked - updated,
            "journal": ended - asked,
            "encoding": encoded - planned + decoded - arrived,
            "schedule_and_update": planned - begun + ended - decoded,
        }
