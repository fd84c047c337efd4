"""One executor: its session, its scheduler, and the loop that keeps steps in flight.

A lane lives as long as its pool. A session begins when the executor is open under the pool's epoch and ends when either
side breaks; its sequences then go back to the queue and are computed again, here or on another executor.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog

from gateway.admission import admit_request
from gateway.core.merging import TableMerges
from gateway.core.precedence import SchedulingPolicy
from gateway.core.prefix_wait import PrefixWait
from gateway.core.queue import WaitingQueue
from gateway.core.sequence import Sequence, SequenceState
from gateway.core.step import StepDraft, Update
from gateway.forking import Forking
from gateway.lane_owner import LaneOwner
from gateway.plan import scheduler_for, to_outcome, to_plan
from protos.execsvc.v1 import execsvc_pb2 as pb
from quire.errors import (
    BlockPoolExhaustedError,
    ExecutorUnavailableError,
    InvariantError,
    MemoryUnavailableError,
    NotReadyError,
    PoolNotFoundError,
    PrefixPendingError,
    QuireError,
    StaleEpochError,
    TenantCeilingError,
)
from quire.memory import Admission, CloseReason, JournalEntry, Memory, PoolInfo

if TYPE_CHECKING:
    from gateway.clients.executor import ExecutorLink
    from gateway.config import GatewayConfig
    from gateway.core.scheduler import Scheduler

log = structlog.get_logger(__name__)

_RETRY_SECONDS = 0.05
"""Pause before a pool that was short of blocks is asked again, if nothing came back meanwhile."""
_STEP_SECONDS = 300.0
"""A step that takes longer means that the executor hangs."""
_RECONNECT_SECONDS = (0.1, 0.2, 0.5, 1.0)
_TRANSIENT = (BlockPoolExhaustedError, StaleEpochError, MemoryUnavailableError, PoolNotFoundError, NotReadyError)


class Lane:
    """The step loop of one executor.

    Args:
        pool: the executor's pool.
        connect: makes a link to the executor at an address.
        memory: where blocks come from.
        owner: who hears what happens.
        config: limits.
    """

    def __init__(
        self,
        pool: PoolInfo,
        connect: Callable[[str], ExecutorLink],
        memory: Memory,
        owner: LaneOwner,
        config: GatewayConfig,
    ) -> None:
        self._pool = pool
        self._connect = connect
        self._memory = memory
        self._owner = owner
        self._config = config
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._side_tasks: set[asyncio.Task[None]] = set()
        self._scheduler: Scheduler | None = None
        self._queue: WaitingQueue | None = None
        self._in_flight: deque[asyncio.Task[pb.StepResult]] = deque()
        self._admitting: Sequence | None = None
        self._admission_blocked = False
        self._full_tenants: set[str] = set()
        self._ending = False
        self._journal: JournalEntry | None = None
        self._prefix_wait = PrefixWait()
        self._merges = TableMerges()
        self._forking: Forking | None = None

    @property
    def scheduler(self) -> Scheduler | None:
        """The scheduler of the session, if one is open."""
        return self._scheduler

    def wake(self) -> None:
        """Something changed: a request arrived, or one was cancelled."""
        self._wake.set()

    async def restart(self, pool: PoolInfo) -> None:
        """Begins a session for a new epoch or a new connection; every older table is void."""
        await self.stop()
        self._pool = pool
        if pool.ready:
            self._task = asyncio.create_task(self._keep_session(), name=f"lane-{pool.pool_id}")
            self._task.add_done_callback(self._session_done)

    async def stop(self) -> None:
        """Ends the session; its tables are left to memsvc's reaper."""
        # Side tasks first: a sequence that was being admitted goes back to the queue behind those that ran.
        self._ending = True
        side_tasks = tuple(self._side_tasks)
        for task in side_tasks:
            task.cancel()
        await asyncio.gather(*side_tasks, return_exceptions=True)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        self._ending = False

    def _session_done(self, task: asyncio.Task[None]) -> None:
        """The loop only ends when it is cancelled: anything else is a defect, after which nothing can be trusted."""
        if not task.cancelled():
            log.error("invariant_violated", pool_id=self._pool.pool_id, exc_info=task.exception())
            self._owner.fatal(f"lane of {self._pool.pool_id} failed: {task.exception()!r}")

    def finish(self, sequence: Sequence, reason: CloseReason) -> None:
        """Ends a sequence that has a table here, or content in host memory; the next step removes it."""
        if self._scheduler is not None:
            self._scheduler.finish(sequence, reason)
            self.wake()

    def merge(self, rows: list[tuple[int, int, int]]) -> None:
        """Has tables name other blocks with the same content; the next step does it."""
        self._merges.offer(rows)

    def recall(self, block_count: int) -> None:
        """Gives unused blocks back."""
        if self._scheduler is not None:
            blocks = self._scheduler.lease.surrender(block_count)
            if blocks:
                self._write_journal(JournalEntry(self._pool.pool_id, self._pool.epoch, returned=blocks))

    # --- sessions -----------------------------------------------------------------------------------------------

    async def _keep_session(self) -> None:
        """Opens a session, again and again."""
        orphans: JournalEntry | None = None
        lease = None
        attempt = 0
        while True:
            link = self._connect(self._pool.executor_address)
            try:
                await self._open(link)
                attempt = 0
                assert self._scheduler is not None
                if orphans is not None and lease is not None:
                    self._settle_orphans(orphans, lease.surrender())
                    self._scheduler.lease.granted_total = lease.granted_total
                await self._loop(link)
            except InvariantError:
                raise
            except QuireError as error:
                event = "executor_unreachable" if self._scheduler is None else "executor_lost"
                if attempt == 0:
                    log.warning(event, pool_id=self._pool.pool_id, reason=error.reason, message=error.message)
            except TimeoutError:
                log.warning("executor_unreachable", pool_id=self._pool.pool_id, reason="TIMEOUT")
            finally:
                if self._scheduler is not None:
                    lease = self._scheduler.lease
                    orphans = self._end_session()
                await self._cancel_in_flight()
                await link.close()
            await asyncio.sleep(_RECONNECT_SECONDS[min(attempt, len(_RECONNECT_SECONDS) - 1)])
            attempt += 1

    async def _open(self, link: ExecutorLink) -> None:
        """Opens the executor and makes the session's scheduler."""
        description = await link.describe()
        if not description.ready:
            raise NotReadyError(f"the executor is still loading ({description.load_progress:.0%})")
        if description.executor_incarnation != self._pool.executor_incarnation:
            raise StaleEpochError("the executor has restarted; memsvc will say so")
        request = pb.Open(
            gateway_id=self._config.gateway_id,
            gateway_incarnation=self._memory.gateway_incarnation,
            executor_incarnation=self._pool.executor_incarnation,
            epoch=self._pool.epoch,
        )
        await link.open(request)
        self._queue = await self._owner.model_queue(link, description, self._pool)
        scheduler = self._scheduler = scheduler_for(self._pool, description, self._config)
        self._forking = Forking(
            self._pool, self._memory, scheduler, self._write_journal, lambda: self._scheduler is scheduler
        )
        self._admission_blocked = False
        self._wake.set()
        log.info(
            "executor_connected",
            pool_id=self._pool.pool_id,
            epoch=self._pool.epoch,
            address=self._pool.executor_address,
        )

    def _end_session(self) -> JournalEntry:
        """Queues the session's sequences again; returns what memsvc is to hear of their tables."""
        scheduler, self._scheduler = self._scheduler, None
        assert scheduler is not None
        assert self._queue is not None
        orphans = self._journal or JournalEntry(self._pool.pool_id, self._pool.epoch)
        orphans.closed = [sequence.table for sequence in scheduler.sequences()]
        orphans.close_reasons = [CloseReason.PREEMPTED] * len(orphans.closed)
        self._end_prefix_wait()
        self._merges.clear()
        scheduler.now = asyncio.get_running_loop().time()
        requeued, released = scheduler.abandon()
        self._queue.put_back(requeued)
        for sequence in released:
            self._owner.released(sequence)
        self._owner.session_ended(self._pool.pool_id)
        self._journal = None
        return orphans

    def _settle_orphans(self, orphans: JournalEntry, blocks: list[int]) -> None:
        """Closes the tables of a broken session. The executor has acknowledged the new one: nothing writes to them."""
        orphans.returned = blocks
        if orphans:
            self._write_journal(orphans)

    async def _cancel_in_flight(self) -> None:
        for task in self._in_flight:
            task.cancel()
        await asyncio.gather(*self._in_flight, return_exceptions=True)
        self._in_flight.clear()

    # --- steps --------------------------------------------------------------------------------------------------

    async def _loop(self, link: ExecutorLink) -> None:
        """Keeps steps in flight until the session breaks."""
        scheduler = self._scheduler
        assert scheduler is not None
        step = 0
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            scheduler.now = loop.time()
            while self._in_flight and self._in_flight[0].done():
                self._absorb(self._in_flight.popleft().result())
            self._admit_next(scheduler)
            self._refill(scheduler)
            if len(self._in_flight) < self._config.pipeline_depth:
                draft = scheduler.schedule()
                self._refill(scheduler)
                if draft:
                    step += 1
                    if draft.appended or draft.replaced:
                        self._note_growth(draft)
                    if self._merges:
                        draft.appended += self._merges.plan(step, scheduler.sequences())
                    plan = to_plan(draft, step, self._pool.epoch)
                    running = asyncio.create_task(link.run(plan), name=f"step-{step}")
                    running.add_done_callback(lambda _: self._wake.set())
                    self._in_flight.append(running)
                    continue
            self._return_idle_lease(scheduler)
            if not self._is_stuck() or not scheduler.yield_held():
                await self._wait()

    def _is_stuck(self) -> bool:
        """Whether somebody waits for room and nothing is under way that could make it."""
        return bool(self._queue) and not self._in_flight and self._admitting is None and not self._side_tasks

    async def _wait(self) -> None:
        """Waits for a result or for news; a step that never answers ends the session."""
        try:
            async with asyncio.timeout(_STEP_SECONDS if self._in_flight else None):
                await self._wake.wait()
        except TimeoutError:
            raise ExecutorUnavailableError(f"no result in {_STEP_SECONDS:g} s: the executor hangs") from None

    def _note_growth(self, draft: StepDraft) -> None:
        """Keeps what a step puts into tables for the journal that travels with the next result."""
        if self._journal is None:
            self._journal = JournalEntry(self._pool.pool_id, self._pool.epoch)
        self._journal.appended += draft.appended
        self._journal.replaced += draft.replaced
        draft.appended += draft.replaced

    def _write_journal(self, entry: JournalEntry) -> None:
        """Sends an entry, with the growth that was planned before it."""
        pending, self._journal = self._journal, None
        if pending is not None:
            entry.appended = pending.appended + entry.appended
            entry.replaced = pending.replaced + entry.replaced
        self._memory.journal(entry)

    def _absorb(self, result: pb.StepResult) -> None:
        """Takes in the result of a step: tokens first, then what it frees."""
        scheduler, queue = self._scheduler, self._queue
        assert scheduler is not None
        assert queue is not None
        update = scheduler.update(to_outcome(result))
        for sequence, row in update.logprobs:
            self._owner.logprobs(sequence, row)
        for sequence, token in update.tokens:
            if not sequence.ended and self._owner.token(sequence, token):
                scheduler.finish(sequence, CloseReason.FINISHED)
        if queue.policy is SchedulingPolicy.FAIR:
            for sequence in update.reported:
                queue.served(sequence)
        for source, samples in [*update.siblings, *self._owner.take_forks()]:
            self._spawn(self._fork(queue, source, samples), "fork")
        update.journal.replaced += self._merges.done(result.step)
        # Growth is told of with the next result, whether that fills a block or not.
        if update.journal or self._journal is not None:
            self._write_journal(update.journal)
        for sequence, reason, message in update.failed:
            self._owner.failed(sequence, QuireError(message, reason=reason))
        self._after_update(queue, update)
        self._end_prefix_wait(scheduler)

    def _after_update(self, queue: WaitingQueue, update: Update) -> None:
        """Queues what comes back and starts what waited for a prompt."""
        for sequence in update.released:
            self._owner.released(sequence)
        for sequence in update.requeued:
            self._put_back(queue, sequence)
        if update.journal.closed:
            self._admission_blocked = False
            self._full_tenants.clear()

    # --- blocks -------------------------------------------------------------------------------------------------

    def _refill(self, scheduler: Scheduler) -> None:
        """Asks for blocks to grow with, when the stock is low; the step does not wait for them."""
        lease = scheduler.lease
        asked = 0 if lease.exhausted or self._ending else scheduler.blocks_wanted()
        if asked:
            lease.refilling = True
            self._spawn(self._fetch_blocks(scheduler, asked), "lease-refill")

    async def _fetch_blocks(self, scheduler: Scheduler, asked: int) -> None:
        """Brings blocks into the lease."""
        blocks: list[int] = []
        try:
            blocks = await self._memory.lease(
                self._pool.pool_id, self._pool.epoch, scheduler.lease.granted_total + asked
            )
        except _TRANSIENT as error:
            log.info("lease_refused", pool_id=self._pool.pool_id, reason=error.reason)
        # The session may have broken meanwhile: then the next one has them, or `_settle_orphans` gives them back.
        scheduler = self._scheduler or scheduler
        scheduler.lease.refilled(blocks, asked)
        if scheduler.lease.exhausted:
            asyncio.get_running_loop().call_later(_RETRY_SECONDS, self._retry, scheduler)
        self.wake()

    def _retry(self, scheduler: Scheduler) -> None:
        """Allows the pool to be asked again."""
        scheduler.lease.exhausted = False
        self._admission_blocked = False
        self._full_tenants.clear()
        self.wake()

    def _return_idle_lease(self, scheduler: Scheduler) -> None:
        """Gives everything back when nothing runs: an idle gateway holds no memory."""
        idle = scheduler.open_count == 0 and not self._in_flight and self._admitting is None
        if idle and len(scheduler.lease) and not scheduler.lease.refilling:
            self._write_journal(
                JournalEntry(self._pool.pool_id, self._pool.epoch, returned=scheduler.lease.surrender())
            )

    # --- admission ----------------------------------------------------------------------------------------------

    def _admit_next(self, scheduler: Scheduler) -> None:
        """Starts the admission of the head of the queue, one at a time."""
        queue = self._queue
        if queue is None or self._admitting is not None or self._admission_blocked or self._ending:
            return
        if not scheduler.can_admit():
            return
        sequence = queue.pop(self._full_tenants, self._pool.pool_id)
        if sequence is not None:
            self._admitting = sequence
            self._spawn(self._admit(scheduler, queue, sequence), "admission")

    async def _admit(self, scheduler: Scheduler, queue: WaitingQueue, sequence: Sequence) -> None:
        """Admits one sequence, or puts it back."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        request = admit_request(self._pool, sequence, wait_for_prefix=self._prefix_wait.may_wait(sequence, now))
        try:
            admission = await self._memory.admit(request)
        except PrefixPendingError as error:
            self._prefix_wait.add(sequence, int(error.metadata["table"]), int(error.metadata["token_count"]), now)
            loop.call_later(_RETRY_SECONDS, self._end_prefix_wait)
        except TenantCeilingError as error:
            # Others go ahead: only the end of one of the tenant's own sequences makes room for it.
            log.debug("admission_refused", reason=error.reason, message=error.message)
            self._full_tenants.add(sequence.request.settings.tenant)
            self._put_back(queue, sequence)
            loop.call_later(_RETRY_SECONDS, self._retry, scheduler)
        except _TRANSIENT as error:
            log.debug("admission_refused", reason=error.reason, message=error.message)
            self._put_back(queue, sequence)
            self._admission_blocked = True
            loop.call_later(_RETRY_SECONDS, self._retry, scheduler)
        except QuireError as error:
            sequence.state = SequenceState.FINISHED
            scheduler.swapping.release(sequence)
            self._owner.failed(sequence, error)
            self._owner.released(sequence)
        except BaseException:
            self._put_back(queue, sequence)
            raise
        else:
            self._prefix_wait.forget(sequence)
            self._take_in(scheduler, queue, sequence, admission)
        finally:
            self._admitting = None
            self.wake()

    def _end_prefix_wait(self, scheduler: Scheduler | None = None) -> None:
        """Queues those who waited for a prefix: all, or those for whom a sequence of `scheduler` has computed it."""
        if self._queue is None or not self._prefix_wait:
            return
        computed = None
        if scheduler is not None:
            computed = {sequence.table: sequence.computed for sequence in scheduler.sequences()}
        for sequence in reversed(self._prefix_wait.take(computed)):
            self._put_back(self._queue, sequence)
        self.wake()

    def _put_back(self, queue: WaitingQueue, sequence: Sequence) -> None:
        """Returns a sequence that was not admitted to the head of the queue, unless it has ended meanwhile."""
        if sequence.ended:
            self.finish(sequence, CloseReason.CANCELLED)
            sequence.state = SequenceState.FINISHED
            self._owner.released(sequence)
        else:
            queue.put_back([sequence])

    def _take_in(self, scheduler: Scheduler, queue: WaitingQueue, sequence: Sequence, admission: Admission) -> None:
        """Starts an admitted sequence; if it ended or the session did meanwhile, its table is closed unused."""
        if scheduler is self._scheduler and not sequence.ended:
            scheduler.now = asyncio.get_running_loop().time()
            scheduler.start(sequence, admission)
            queue.admitted(sequence, admission.cached_token_count)
            self._owner.admitted(sequence)
            return
        entry = JournalEntry(
            self._pool.pool_id, admission.epoch, closed=[admission.table], close_reasons=[CloseReason.CANCELLED]
        )
        self._write_journal(entry)
        self._put_back(queue, sequence)

    async def _fork(self, queue: WaitingQueue, source: Sequence, samples: list[Sequence]) -> None:
        """Has samples run on the blocks of `source`, or else queues them."""
        assert self._forking is not None
        left = samples
        try:
            left = await self._forking.begin(source, samples, taken=self._admitting is not None)
        finally:
            source.resume()
            queue.resumed(source)
            for sample in left:
                self._put_back(queue, sample)
            self.wake()
        for sample in samples:
            if sample.state is SequenceState.RUNNING:
                self._owner.admitted(sample)

    def _spawn(self, coroutine: object, name: str) -> None:
        """Runs a short task that the lane owns."""
        task: asyncio.Task[None] = asyncio.create_task(coroutine, name=name)  # type: ignore[arg-type]
        self._side_tasks.add(task)
        task.add_done_callback(self._side_done)

    def _side_done(self, task: asyncio.Task[None]) -> None:
        """Forgets a finished side task; a defect in one is logged, never swallowed."""
        self._side_tasks.discard(task)
        if not self._side_tasks and not self._in_flight:
            # Whether anything is under way is asked without it.
            self.wake()
        if not task.cancelled() and task.exception() is not None:
            log.error("lane_task_failed", task=task.get_name(), exc_info=task.exception())
