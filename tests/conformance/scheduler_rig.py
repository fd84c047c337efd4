"""A gateway's scheduler and queue on the memory core, with an executor that checks every slot it reads, in lockstep.

What a lane does between two results happens in the same order and at known moments: admissions, blocks for growth, the
next step, its result, its journal. Nothing waits, so a test says when each of them happens.
"""

from __future__ import annotations

from array import array
from collections import deque
import itertools

from gateway.core.precedence import SchedulingPolicy
from gateway.core.queue import WaitingQueue
from gateway.core.request import Request, RequestSettings, SamplingSettings
from gateway.core.scheduler import Scheduler
from gateway.core.sequence import Sequence, SequenceState
from gateway.core.step import StepDraft, Update
from gateway.core.stopping import stop_by_length, stop_by_token
from gateway.core.swapping import SwapSettings
from gateway.plan import to_outcome, to_plan
from memsvc.core.invariants import check_pool
from memsvc.core.memory import MemoryCore, PoolRegistration
from memsvc.core.pool import BlockState
from memsvc.local import packed
from protos.execsvc.v1 import execsvc_pb2 as pb
from quire import columns
from quire.errors import BlockPoolExhaustedError
from quire.memory import Admission, AdmitRequest, CloseReason, JournalEntry, PoolInfo, PoolSpec
from tests.simulation.oracle_executor import OracleExecutor, expected_tokens

SIZE = 16
POOL_ID = "pool"
CONTEXT = 512
_TURN_LIMIT = 3000


class Rig:
    """One pool, one scheduler, one queue.

    Args:
        usable: blocks of the pool.
        budget: tokens of a step.
        max_num_seqs: most sequences with a table.
        depth: steps in flight, in `turn` and `run`.
        policy: who goes first.
        threshold: most tokens of one remainder in a step that others take part in; 0 for no limit.
        forecast: whether the core keeps headroom for what runs.
        max_preemptions: see `choose_victim`.
        ageing: seconds that are worth a step of priority; 0 for none.
        swap: host memory of the executor; none by default.
    """

    def __init__(
        self,
        usable: int = 64,
        *,
        budget: int = 64,
        max_num_seqs: int = 16,
        depth: int = 1,
        policy: SchedulingPolicy = SchedulingPolicy.FCFS,
        threshold: int = 0,
        forecast: bool = False,
        max_preemptions: int = 8,
        ageing: float = 0.0,
        swap: SwapSettings | None = None,
    ) -> None:
        spec = PoolSpec(usable + 1, SIZE, 1024, "oracle-model", "float32", CONTEXT)
        self.core = MemoryCore(bytes(32), lease_ttl=float("inf"), forecast=forecast)
        self.core.register_pool(PoolRegistration(POOL_ID, 1, "oracle:0", spec), 1, 0.0)
        self._gateway = self.core.connect_gateway("gateway", 1, 0.0)
        self._info: PoolInfo = self.core.pool(POOL_ID).info()
        self.scheduler = Scheduler(
            self._info,
            max_num_seqs,
            budget,
            max_preemptions,
            policy=policy,
            long_prefill_token_threshold=threshold,
            swap=swap,
        )
        self.queue = WaitingQueue(1024, policy)
        self.executor = OracleExecutor(spec, float, budget, swap.slot_count if swap else 0)
        self.in_flight: deque[tuple[StepDraft, pb.StepPlan]] = deque()
        self.asked: list[Sequence] = []
        """Sequences whose admission the core was asked for, granted or not."""
        self.refusals: list[BlockPoolExhaustedError] = []
        self.closed: list[int] = []
        """Tables in the order in which the journal closed them."""
        self.output: dict[Sequence, list[int]] = {}
        """Tokens that were delivered."""
        self._depth = depth
        self._ageing = ageing
        self._appended: list[int] = []
        self._steps = itertools.count(1)
        self._arrivals = itertools.count(1)

    # Requests

    def submit(
        self,
        prompt: int | list[int],
        *,
        max_tokens: int = 400,
        name: str = "",
        priority: int = 0,
        arrived_at: float | None = None,
        stop_at: int = 0,
        min_tokens: int = 0,
        tenant: str = "",
    ) -> Sequence:
        """Queues a request; a number stands for a prompt of that length that shares nothing.

        `stop_at` makes the token that it produces there, counted from 1, a stop token: an end that nobody foresees.
        """
        number = next(self._arrivals)
        tokens = prompt if isinstance(prompt, list) else [(37 * number + place) % 251 + 1 for place in range(prompt)]
        stop = expected_tokens(tokens, number, stop_at, ignore_eos=True)[-1:]
        settings = RequestSettings(
            name or f"r{number}",
            "oracle-model",
            array("I", tokens),
            max_tokens,
            SamplingSettings(seed=number),
            min_tokens=min_tokens,
            stop_token_ids=frozenset(stop),
            priority=priority,
            tenant=tenant,
        )
        at = float(number) if arrived_at is None else arrived_at
        request = Request(settings, CONTEXT, at, self._ageing)
        self.queue.push_request(request)
        self.output[request.samples[0]] = []
        return request.samples[0]

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence as its client does, wherever it is."""
        sequence.ended = True
        self.scheduler.finish(sequence, CloseReason.CANCELLED)
        if self.queue.remove(sequence):
            sequence.state = SequenceState.FINISHED

    def expected(self, sequence: Sequence) -> list[int]:
        """Returns what a sequence must produce up to its limit, stop tokens aside."""
        settings = sequence.request.settings
        most = sequence.length_limit - sequence.prompt_length
        return expected_tokens(list(settings.prompt), settings.sampling.seed, most, ignore_eos=True)

    # What a lane does

    def ask(self, sequence: Sequence) -> Admission:
        """Asks the core for a table; raises BlockPoolExhaustedError."""
        self.asked.append(sequence)
        request = AdmitRequest(
            POOL_ID,
            self._info.epoch,
            sequence.request.settings.request_id,
            sequence.index,
            columns.pack(sequence.tokens),
            max_new_tokens=sequence.length_limit - len(sequence.tokens),
            resumed=sequence.preemption_count > 0,
            swapped_token_count=sequence.swapped.token_count if sequence.swapped is not None else 0,
        )
        return self.core.admit(self._gateway, request, 0.0)

    def admit(self) -> None:
        """Admits from the head of the queue until the scheduler or the core says no."""
        while self.scheduler.can_admit():
            sequence = self.queue.pop(pool_id=POOL_ID)
            if sequence is None:
                return
            try:
                admission = self.ask(sequence)
            except BlockPoolExhaustedError as error:
                self.refusals.append(error)
                self.queue.put_back([sequence])
                return
            self.scheduler.start(sequence, admission)
            self.queue.admitted(sequence, admission.cached_token_count)

    def refill(self) -> None:
        """Brings blocks into the lease."""
        lease = self.scheduler.lease
        asked = 0 if lease.exhausted else self.scheduler.blocks_wanted()
        if asked:
            granted = self.core.lease(self._gateway, POOL_ID, self._info.epoch, lease.granted_total + asked, 0.0)
            lease.refilled(granted, asked)

    def plan(self) -> StepDraft:
        """Plans a step and sends it off, if there is anything to do."""
        self.refill()
        draft = self.scheduler.schedule()
        self.refill()
        if draft:
            self._appended += draft.appended
            self.in_flight.append((draft, to_plan(draft, next(self._steps), self._info.epoch)))
        return draft

    def land(self) -> Update:
        """Runs the oldest step in flight and takes its result in: tokens, ends, journal, returns to the queue."""
        _, plan = self.in_flight.popleft()
        update = self.scheduler.update(to_outcome(self.executor._apply(plan)))
        for sequence, token in update.tokens:
            if sequence.ended:
                continue
            self.output[sequence].append(token)
            if stop_by_token(sequence) or stop_by_length(sequence):
                sequence.ended = True
                self.scheduler.finish(sequence, CloseReason.FINISHED)
        for sequence in update.reported:
            self.queue.served(sequence)
        self._write(update.journal)
        for sequence in update.requeued:
            if sequence.ended:
                sequence.state = SequenceState.FINISHED
            else:
                self.queue.put_back([sequence])
        return update

    def _write(self, journal: JournalEntry) -> None:
        journal.appended, self._appended = self._appended + journal.appended, []
        self.closed += journal.closed
        if journal:
            self.core.journal(self._gateway, POOL_ID, self._info.epoch, packed(journal), 0.0)
        check_pool(self.core.pool(POOL_ID).memory)

    def turn(self) -> None:
        """Admits, plans, and takes the oldest result in when `depth` steps are in flight or nothing is left to plan."""
        self.admit()
        draft = self.plan()
        if self.in_flight and (len(self.in_flight) >= self._depth or not draft):
            self.land()
        elif not draft:
            # What a lane does a little later by its clock.
            self.scheduler.lease.exhausted = False

    def turns(self, count: int) -> None:
        """Takes several turns."""
        for _ in range(count):
            self.turn()

    def turns_until_preempted(self, *sequences: Sequence) -> list[Sequence]:
        """Takes turns until some of `sequences` have given way, and returns those."""
        for _ in range(_TURN_LIMIT):
            if found := preempted(list(sequences)):
                return found
            self.turn()
        raise AssertionError("nobody was preempted")

    def run(self) -> None:
        """Takes turns until everything has ended; then nothing is held and every output is what it must be."""
        for _ in range(_TURN_LIMIT):
            if all(sequence.state is SequenceState.FINISHED for sequence in self.output) and not self.in_flight:
                break
            self.turn()
        else:
            raise AssertionError("requests are left and none goes on")
        self.turns(2)
        assert not self.executor.rows
        assert self.used() == 0
        assert not self.executor.host
        assert not self.scheduler.swapping.held_count

    def take(self, count: int) -> list[int]:
        """Leases blocks that nobody grows into."""
        lease = self.scheduler.lease
        lease.granted_total += count
        return self.core.lease(self._gateway, POOL_ID, self._info.epoch, lease.granted_total, 0.0)

    def give_back(self, blocks: list[int]) -> None:
        """Returns leased blocks."""
        self._write(JournalEntry(POOL_ID, self._info.epoch, returned=blocks))

    # What is seen

    def used(self) -> int:
        """Returns the blocks in tables."""
        return self.core.pool(POOL_ID).memory.pool.count(BlockState.USED)

    def available(self) -> int:
        """Returns the blocks that can be had now."""
        return self.core.pool(POOL_ID).memory.pool.available_block_count

    def running(self) -> list[Sequence]:
        """Returns the sequences that are scheduled, in order of admission."""
        return [sequence for sequence in self.scheduler.sequences() if sequence.state is SequenceState.RUNNING]


def preempted(sequences: list[Sequence]) -> list[Sequence]:
    """Returns those that were preempted."""
    return [sequence for sequence in sequences if sequence.preemption_count]
