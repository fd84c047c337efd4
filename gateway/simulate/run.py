"""One policy, one workload: queue, scheduler, memory and executor in lockstep.

A turn is what a lane of the gateway does between two results: admissions in order of arrival, blocks for growth, the
next step, its result, its journal. Everything but the executor is what serves in production.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
import dataclasses
import time
from typing import Final

import numpy as np

from gateway.core.queue import WaitingQueue
from gateway.core.request import Request, RequestSettings, SamplingSettings
from gateway.core.scheduler import Scheduler
from gateway.core.sequence import Sequence, SequenceState
from gateway.core.step import StepDraft, Update
from gateway.core.swapping import PreemptionMode, SwapSettings
from gateway.simulate.executor import FakeExecutor
from gateway.simulate.measure import Counters, PolicyResult, Recorder, Slots
from gateway.simulate.workload import Workload
from memsvc.policies.interface import Policy, Wish
from quire import columns
from quire.errors import BlockPoolExhaustedError, InvariantError, PromptTooLongError
from quire.memory import AdmitRequest, CloseReason
from quire.units import div_ceil

Progress = Callable[[int, int], None]

_QUEUE_AHEAD: Final = 8
"""Requests made ready ahead of their admission: prompts are long, and a trace has many."""
_RETRY_STEPS: Final = 4
"""Steps after which a refused admission is tried again though nothing came back, as a lane does by time."""
_MAX_PREEMPTIONS: Final = 8
_MODEL: Final = "simulated"
_IDLE_LIMIT: Final = 3


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a step and a request.

    Attributes:
        max_num_seqs: most sequences with a table.
        max_num_batched_tokens: token budget of a step.
        max_tokens: completion tokens that every request asks for; None for as many as the model allows.
        step_seconds: time a step takes; arrivals are compared with it.
        timed_arrivals: whether requests arrive as in the trace; otherwise all are there at the beginning.
        swap_slot_count: blocks of preempted sequences that fit into host memory.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_tokens: int | None = None
    step_seconds: float = 0.03
    timed_arrivals: bool = False
    swap_slot_count: int = 0


class Simulation:
    """Runs a workload under a policy.

    Args:
        name: of the policy.
        policy: the memory.
        workload: the requests.
        limits: see Limits.
        progress: called with (requests done, requests).
    """

    def __init__(self, name: str, policy: Policy, workload: Workload, limits: Limits, progress: Progress) -> None:
        self._name = name
        self._policy = policy
        self._workload = workload
        self._limits = limits
        self._progress = progress
        spec = policy.pool.spec
        self._size = spec.block_size
        self._longest = spec.max_model_len
        self._scheduler = Scheduler(
            policy.pool,
            limits.max_num_seqs,
            limits.max_num_batched_tokens,
            max_preemptions=_MAX_PREEMPTIONS,
            swap=SwapSettings(limits.swap_slot_count, mode=PreemptionMode.SWAP),
        )
        self._queue = WaitingQueue(2 * _QUEUE_AHEAD)
        self._executor = FakeExecutor(len(workload), workload.output_token)
        self._recorder = Recorder(spec.usable_block_count * self._size)
        self.counters = Counters()
        self._numbers: dict[Sequence, int] = {}
        self._next = 0
        self._steps = 0
        self._now = 0.0
        self._retry_at = 0
        self._appended: list[int] = []
        # Tokens that a request has in the end, but for the last one, whose keys and values nobody computes.
        self._outputs = np.minimum(workload.output_lengths, self._longest - workload.prompt_lengths)
        if limits.max_tokens is not None:
            self._outputs = np.minimum(self._outputs, limits.max_tokens)

    def run(self) -> PolicyResult:
        """Runs until every request is finished or rejected."""
        began = time.perf_counter()
        total = len(self._workload)
        idle = 0
        done = -1
        while self._next < total or self._numbers or self._scheduler.open_count:
            self._fill_queue()
            self._admit()
            self._refill()
            draft = self._scheduler.schedule()
            self._refill()
            if not draft:
                idle = self._rest(idle)
                continue
            idle = 0
            self._step(draft)
            if self.counters.finished_count != done:
                done = self.counters.finished_count
                self._progress(done + self.counters.rejected_count, total)
        self.counters.computed_tokens = self._executor.computed_tokens
        self.counters.recomputed_tokens = self._executor.recomputed_tokens
        stats, swap = self._scheduler.stats, self._scheduler.swapping.stats
        self.counters.swapped_blocks = swap.out_count + swap.in_count
        return PolicyResult(
            self._name,
            self.counters,
            self._recorder,
            self._steps,
            stats.preemption_count,
            stats.stalled_count,
            time.perf_counter() - began,
        )

    def _rest(self, idle: int) -> int:
        """Nothing can be computed: waits for the next arrival, or for blocks that were refused.

        Raises:
            InvariantError: nothing will ever change.
        """
        self._scheduler.lease.exhausted = False
        self._retry_at = 0
        if not self._numbers and self._next < len(self._workload):
            self._now = max(self._now, float(self._workload.arrivals[self._next]))
            return 0
        if idle == _IDLE_LIMIT:
            raise InvariantError(f"{self._name}: {len(self._numbers)} requests are left and none can go on")
        return idle + 1

    # Requests

    def _fill_queue(self) -> None:
        """Makes the next requests ready, and rejects those that can never be served."""
        workload = self._workload
        while self._next < len(workload) and len(self._queue) < _QUEUE_AHEAD:
            index = self._next
            if self._limits.timed_arrivals and workload.arrivals[index] > self._now:
                return
            self._next += 1
            length = int(workload.prompt_lengths[index])
            if length >= self._longest:
                self.counters.rejected_count += 1
                continue
            wanted = int(workload.output_lengths[index])
            self.counters.truncated_count += wanted > int(self._outputs[index])
            limit = self._longest - length
            if workload.knows_output:
                limit = min(limit, wanted)
            if self._limits.max_tokens is not None:
                limit = min(limit, self._limits.max_tokens)
            settings = RequestSettings(
                f"r{index}", _MODEL, array("I", workload.prompt(index).tobytes()), limit, SamplingSettings()
            )
            request = Request(settings, self._longest, float(workload.arrivals[index]))
            self._numbers[request.samples[0]] = index
            self._queue.push_request(request)

    def _admit(self) -> None:
        """Admits from the head of the queue until one is refused."""
        scheduler = self._scheduler
        if self._steps < self._retry_at:
            return
        while scheduler.can_admit():
            sequence = self._queue.pop(pool_id=self._policy.pool.pool_id)
            if sequence is None:
                return
            try:
                self._open(sequence)
            except BlockPoolExhaustedError:
                self._queue.put_back([sequence])
                self._retry_at = self._steps + _RETRY_STEPS
                return
            except PromptTooLongError:
                del self._numbers[sequence]
                self.counters.rejected_count += 1
            self._fill_queue()

    def _open(self, sequence: Sequence) -> None:
        index = self._numbers[sequence]
        resumed = sequence.preemption_count > 0
        request = AdmitRequest(
            pool_id=self._policy.pool.pool_id,
            epoch=self._policy.pool.epoch,
            request_id=sequence.request.settings.request_id,
            sample_index=0,
            token_ids=columns.pack(np.frombuffer(sequence.tokens, np.uint32)),
            max_new_tokens=sequence.length_limit - len(sequence.tokens),
            resumed=resumed,
            min_new_tokens=sequence.length_limit - len(sequence.tokens) if self._workload.knows_output else 0,
            swapped_token_count=sequence.swapped.token_count if sequence.swapped is not None else 0,
        )
        admission = self._policy.admit(Wish(request, int(self._outputs[index]), sequence.prompt_length))
        self._scheduler.start(sequence, admission)
        self._executor.add(sequence, index)
        if not resumed:
            self.counters.query_tokens += sequence.prompt_length
            self.counters.hit_tokens += admission.cached_token_count

    # Steps

    def _refill(self) -> None:
        """Brings blocks into the lease; here the answer is there before the next step."""
        lease = self._scheduler.lease
        asked = 0 if lease.exhausted else self._scheduler.blocks_wanted()
        if asked:
            lease.refilled(self._policy.lease(lease.granted_total + asked), asked)

    def _step(self, draft: StepDraft) -> None:
        """Runs a step and takes in what came of it."""
        self._steps += 1
        self._now += self._limits.step_seconds
        update = self._scheduler.update(self._executor.run(draft))
        self._finish(update)
        entry = update.journal
        entry.appended = draft.appended + entry.appended
        if entry:
            self._policy.journal(entry)
        if entry.closed:
            self._retry_at = 0
        if update.requeued:
            self._queue.put_back(update.requeued)
        self._recorder.add(self._slots(), len(draft.scheduled_tables), saturated=len(self._queue) > 0)

    def _finish(self, update: Update) -> None:
        """Ends the sequences that have all their tokens."""
        for sequence, _ in update.tokens:
            if sequence.completion_length >= self._outputs[self._numbers[sequence]]:
                sequence.ended = True
                self._scheduler.finish(sequence, CloseReason.FINISHED)
                counters = self.counters
                counters.finished_count += 1
                counters.finished_prompt_tokens += sequence.prompt_length
                counters.finished_output_tokens += sequence.completion_length
        for sequence in [sequence for sequence in update.requeued if sequence.ended]:
            update.requeued.remove(sequence)
            update.released.append(sequence)
        for sequence in update.released:
            del self._numbers[sequence]

    def _slots(self) -> Slots:
        """Returns what the slots of the pool hold now."""
        size = self._size
        running = [s for s in self._scheduler.sequences() if s.state is SequenceState.RUNNING]
        useful = sum(sequence.computed for sequence in running)
        held = sum(len(sequence.blocks) for sequence in running) * size
        reserved = 0
        for sequence in running:
            final = sequence.prompt_length + int(self._outputs[self._numbers[sequence]]) - 1
            ahead = min(len(sequence.blocks), div_ceil(final, size)) - div_ceil(sequence.computed, size)
            if ahead > 0:
                reserved += ahead
        twice = self._policy.shared_block_count() * size
        reserved *= size
        return Slots(useful - twice, reserved, held - useful - reserved, self._recorder.slot_count - held + twice)
