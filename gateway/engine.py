"""The gateway without its socket: requests in, streams out, one lane for each executor."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
import dataclasses
import time
from typing import TYPE_CHECKING

import structlog

from gateway.accounts import log_finished, usage_of
from gateway.core.precedence import SchedulingPolicy
from gateway.core.queue import WaitingQueue
from gateway.core.request import Request, RequestSettings
from gateway.core.sequence import Sequence, SequenceState
from gateway.core.step import LogprobRow
from gateway.core.stopping import Stop, may_stop, stop_by_length, stop_by_token
from gateway.intake import draining_error, find_model
from gateway.lane import Lane
from gateway.live import LiveRequest, ModelRequests
from gateway.models import ServedModel
from gateway.outputs import best_samples
from gateway.sampling_options import default_sampling
from gateway.streams import RequestStream
from gateway.tokenize import ModelTokenizer
from protos.execsvc.v1 import execsvc_pb2
from protos.gateway.v1 import gateway_pb2 as pb
from quire.errors import (
    AdmissionError,
    NotReadyError,
    QuireError,
    RequestExistsError,
)
from quire.memory import (
    BlocksMerged,
    BlocksRecalled,
    CloseReason,
    Memory,
    MemoryEvent,
    MemoryLost,
    PoolInfo,
    PoolUpdated,
)

if TYPE_CHECKING:
    from gateway.beams import Beams
    from gateway.clients.executor import ExecutorLink
    from gateway.config import GatewayConfig
    from gateway.delivery import Delivery

log = structlog.get_logger(__name__)

_DRAIN_POLL_SECONDS = 0.02
_FINISH_REASONS = {
    Stop.EOS: pb.FINISH_REASON_EOS,
    Stop.STOP_TOKEN: pb.FINISH_REASON_STOP,
    Stop.CONTEXT: pb.FINISH_REASON_CONTEXT,
    Stop.LENGTH: pb.FINISH_REASON_LENGTH,
}


class Engine:
    """Takes checked requests, keeps every lane busy, and ends every request exactly once.

    Args:
        memory: the memory service.
        connect: makes a link to the executor at an address.
        config: limits.
        on_readiness: hears whether any model can be served.
        on_fatal: hears of a defect after which the process must stop.
    """

    def __init__(
        self,
        memory: Memory,
        connect: Callable[[str], ExecutorLink],
        config: GatewayConfig,
        on_readiness: Callable[[bool], None],
        on_fatal: Callable[[str], None],
    ) -> None:
        self._memory = memory
        self._connect = connect
        self._config = config
        self._on_readiness = on_readiness
        self._on_fatal = on_fatal
        self._models: dict[str, ModelRequests] = {}
        self._lanes: dict[str, Lane] = {}
        self._lane_models: dict[str, str] = {}
        self._pools: dict[str, PoolInfo] = {}
        self._live: dict[str, LiveRequest] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._pool_locks: dict[str, asyncio.Lock] = {}
        self._forks: list[tuple[Sequence, list[Sequence]]] = []
        self._draining = False

    # --- life ---------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Connects to the memory service; lanes appear as pools do."""
        await self._memory.start(self._hear)

    async def drain(self) -> None:
        """Refuses new requests and waits until the live ones have ended."""
        self._draining = True
        while self._live:  # noqa: ASYNC110 - ends are counted in one place; polling keeps the step path free of it
            await asyncio.sleep(_DRAIN_POLL_SECONDS)

    async def close(self) -> None:
        """Ends what still lives with UNAVAILABLE and disconnects."""
        self._draining = True
        for live in tuple(self._live.values()):
            live.fail(NotReadyError("the gateway is shutting down", reason="DRAINING"))
        await asyncio.gather(*(lane.stop() for lane in self._lanes.values()))
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._memory.close()

    def _hear(self, event: MemoryEvent) -> None:
        """Reacts to the memory service; lanes restart one event at a time, in order."""
        if isinstance(event, BlocksRecalled):
            lane = self._lanes.get(event.pool_id)
            if lane is not None:
                lane.recall(event.block_count)
        elif isinstance(event, BlocksMerged):
            lane = self._lanes.get(event.pool_id)
            if lane is not None:
                lane.merge(event.rows)
        elif isinstance(event, PoolUpdated):
            self._restart_lane(event.pool)
        elif isinstance(event, MemoryLost):
            for pool in tuple(self._pools.values()):
                self._restart_lane(dataclasses.replace(pool, ready=False))

    def _restart_lane(self, pool: PoolInfo) -> None:
        """Begins a session for a pool as it is now, or ends its session."""
        self._pools[pool.pool_id] = pool
        lane = self._lanes.get(pool.pool_id)
        if lane is None:
            lane = self._lanes[pool.pool_id] = Lane(pool, self._connect, self._memory, self, self._config)
        lock = self._pool_locks.setdefault(pool.pool_id, asyncio.Lock())
        task = asyncio.create_task(self._apply_pool(lane, pool, lock), name=f"pool-update-{pool.pool_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @staticmethod
    async def _apply_pool(lane: Lane, pool: PoolInfo, lock: asyncio.Lock) -> None:
        async with lock:
            await lane.restart(pool)

    # --- models -------------------------------------------------------------------------------------------------

    async def model_queue(
        self, link: ExecutorLink, description: execsvc_pb2.DescribeResponse, pool: PoolInfo
    ) -> WaitingQueue:
        """See LaneOwner: learns the model of an executor; the first one of a name brings the tokenizer."""
        info = description.model
        known = self._models.get(info.name)
        tokenizer = known.served.tokenizer if known is not None else None
        if tokenizer is None:
            tokenizer = ModelTokenizer(await link.tokenizer(), add_bos_token=info.add_bos_token)
        executors = {executor for executor, name in self._lane_models.items() if name == info.name} | {pool.pool_id}
        pool_token_count = pool.spec.sequence_token_limit
        if known is not None and executors != {pool.pool_id}:
            pool_token_count = max(pool_token_count, known.served.pool_token_count)
        served = ServedModel(
            name=info.name,
            architecture=info.architecture,
            vocab_size=info.vocab_size,
            max_model_len=info.max_model_len,
            pool_token_count=pool_token_count,
            eos_token_ids=frozenset(info.eos_token_ids),
            tokenizer=tokenizer,
            executor_ids=tuple(sorted(executors)),
            default_sampling=default_sampling(info.default_sampling),
            default_max_tokens=info.default_sampling.max_tokens or None,
        )
        if known is None:
            policy = SchedulingPolicy(self._config.scheduling_policy)
            self._models[info.name] = ModelRequests(served, WaitingQueue(self._config.max_queue_size, policy))
        else:
            known.served = served
        self._lane_models[pool.pool_id] = info.name
        self._on_readiness(True)
        return self._models[info.name].queue

    def fatal(self, reason: str) -> None:
        """See LaneOwner."""
        self._on_fatal(reason)

    def session_ended(self, pool_id: str) -> None:
        """See LaneOwner."""
        self._lane_models.pop(pool_id, None)
        if not self._lane_models:
            self._on_readiness(False)
        # What waited for this executor alone may go to another one now.
        for lane in self._lanes.values():
            lane.wake()

    @property
    def ready(self) -> bool:
        """Whether any model can be served."""
        return bool(self._lane_models)

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self._draining

    def full_models(self) -> list[str]:
        """Returns the models whose queue has no room."""
        return [name for name, model in self._models.items() if model.queue.is_full]

    def models(self) -> list[ServedModel]:
        """See Intake."""
        return [self._models[name].served for name in sorted(self._models)]

    def find_model(self, name: str) -> ServedModel:
        """See Intake."""
        served = {known: model.served for known, model in self._models.items()}
        return find_model(served, name, draining=self._draining)

    # --- requests -----------------------------------------------------------------------------------------------

    def check_request(self, request_id: str, model: str) -> None:
        """See Intake."""
        if request_id in self._live:
            raise RequestExistsError(f"request_id: {request_id!r} is the id of a live request", field="request_id")
        self._models[model].queue.check_room()

    def submit(self, settings: RequestSettings) -> RequestStream:
        """Queues a request and returns the stream of what comes of it; raises as `start_request`."""
        stream = RequestStream(settings, self._models[settings.model].served.tokenizer.token_bytes)
        self.start_request(settings, stream)
        return stream

    def start_request(self, settings: RequestSettings, delivery: Delivery) -> None:
        """Queues a request.

        Raises:
            RequestExistsError: its id is live.
            AdmissionError: the queue is full.
            NotReadyError: draining.
        """
        if self._draining:
            raise draining_error()
        self.check_request(settings.request_id, settings.model)
        model = self._models[settings.model]
        request = Request(settings, model.served.max_model_len, time.monotonic(), self._config.priority_ageing)
        model.queue.push_request(request)
        live = self._live[settings.request_id] = LiveRequest(request, delivery, model)
        loop = asyncio.get_running_loop()
        live.timer = loop.call_later(settings.max_queue_time, self._queue_timeout, settings.request_id)
        if settings.time_limit:
            live.limit_timer = loop.call_later(settings.time_limit, self._time_limit, settings.request_id)
        for lane in self._lanes.values():
            lane.wake()

    def _queue_timeout(self, request_id: str) -> None:
        """The request has waited too long."""
        live = self._live.get(request_id)
        if live is None or live.request.admitted_at is not None:
            return
        waited = live.request.settings.max_queue_time
        error = AdmissionError(
            f"the request waited {waited:g} s in the queue, which is its limit",
            reason="QUEUE_TIMEOUT",
            metadata={"queue_depth": len(live.model.queue)},
            retry_after=1.0,
        )
        self._abort(live, error)

    def _time_limit(self, request_id: str) -> None:
        """The request has had its time: it ends with what it has."""
        live = self._live.get(request_id)
        if live is None:
            return
        for sample in live.request.samples:
            if not sample.ended:
                ending = pb.Ending(reason=pb.FINISH_REASON_TIME_LIMIT)
                live.delivery.end(sample.index, ending, live.held_text(sample.index))
        self._end_samples(live)

    async def cancel_all(self, request_ids: Collection[str], tenant: str = "") -> set[str]:
        """See Intake."""
        found = await asyncio.gather(*(self.cancel(request_id, tenant) for request_id in request_ids))
        return {request_id for request_id, live in zip(request_ids, found, strict=True) if live}

    async def cancel(self, request_id: str, tenant: str = "") -> bool:
        """Cancels a request of a tenant and waits until its blocks are back; returns whether it was live."""
        live = self._live.get(request_id)
        if live is None or live.request.settings.tenant != tenant:
            return False
        live.request.cancelled = True
        for sample in live.request.samples:
            if not sample.ended:
                live.delivery.end(sample.index, pb.Ending(reason=pb.FINISH_REASON_CANCELLED))
        self._end_samples(live)
        # Whatever becomes of its samples, they end: then it is released.
        await live.released.wait()
        await self._memory.flush()
        return True

    def abandon(self, stream: RequestStream) -> None:
        """See Intake."""
        self.abandon_request(stream.settings.request_id, stream)

    def abandon_request(self, request_id: str, delivery: Delivery) -> None:
        """See `abandon`; nothing happens if another request has this id by now."""
        live = self._live.get(request_id)
        if live is not None and live.delivery is delivery and not live.request.ended:
            live.request.cancelled = True
            self._end_samples(live)

    def _abort(self, live: LiveRequest, error: QuireError) -> None:
        """Ends a request with an error."""
        live.fail(error)
        self._end_samples(live)

    def _end_samples(self, live: LiveRequest) -> None:
        """Ends every sample that has not: queued ones at once, running ones through the next step."""
        live.request.note_blocks()
        for sample in live.request.samples:
            self._end_sample(live, sample, CloseReason.CANCELLED)
        self._check_done(live)

    def _end_sample(self, live: LiveRequest, sample: Sequence, reason: CloseReason) -> None:
        """Ends a sample that has not: a queued one at once, a running one through the next step."""
        if not sample.ended:
            sample.ended = True
            if sample.state is SequenceState.NEW:
                sample.state = SequenceState.FINISHED
                return
            for lane in self._lanes.values():
                lane.finish(sample, reason)
            # One that waits and is not in the queue is just being admitted; its lane sees that it has ended.
            if sample.state is SequenceState.WAITING and live.model.queue.remove(sample):
                sample.state = SequenceState.FINISHED

    # --- what lanes tell ------------------------------------------------------------------------------------------

    def admitted(self, sequence: Sequence) -> None:
        """See LaneOwner."""
        request = sequence.request
        request.note_blocks()
        live = self._live[request.settings.request_id]
        if request.admitted_at is not None:
            return
        request.admitted_at = time.monotonic()
        request.cached_token_count = sequence.cached_token_count
        if live.timer is not None:
            live.timer.cancel()
        event = pb.Admitted(
            request_id=request.settings.request_id,
            prompt_token_count=sequence.prompt_length,
            cached_token_count=sequence.cached_token_count,
        )
        if request.settings.prompt_logprobs is not None and not request.wants_prompt_logprobs:
            live.delivery.prompt_logprobs(live.prompt_rows)
        event.queue_time.FromNanoseconds(int((request.admitted_at - request.arrived_at) * 1e9))
        live.delivery.admitted(event)

    def logprobs(self, sequence: Sequence, row: LogprobRow) -> None:
        """See LaneOwner: streams them with the token, or with the prompt once all of it is there."""
        request = sequence.request
        settings = request.settings
        live = self._live[settings.request_id]
        if live.beams is not None:
            live.beams.note(sequence, row)
        elif row.position >= sequence.prompt_length:
            sequence.cumulative_logprob += row.values[0]
            if settings.logprobs is not None:
                live.delivery.push_logprob(sequence.index, row)
        elif row.position == request.known_prompt_logprobs + 1:
            # What is computed again after a preemption was there before.
            request.known_prompt_logprobs = row.position
            live.prompt_rows.append(row)
            if not request.wants_prompt_logprobs:
                live.delivery.prompt_logprobs(live.prompt_rows)

    def token(self, sequence: Sequence, token: int) -> bool:
        """See LaneOwner: streams the token and decides whether it is the last."""
        request = sequence.request
        settings = request.settings
        live = self._live[settings.request_id]
        if request.first_token_at is None:
            request.first_token_at = time.monotonic()
        if live.beams is not None:
            self._advance_beams(live, live.beams)
            return False
        ending: pb.Ending | None = None
        # What its tokens spell, unless something else is said: nothing for one that only ends the sample.
        text: str | None = None
        stop = stop_by_token(sequence) if token in live.stop_tokens else None
        hidden = stop is Stop.EOS or (stop is Stop.STOP_TOKEN and not settings.include_stop_str)
        if hidden:
            text = ""
        elif live.detokenizers:
            may = stop is None and (not live.stops_late or may_stop(sequence))
            text, stop_string = live.detokenizers[sequence.index].push(token, may_stop=may)
            if stop_string is not None:
                text += stop_string if settings.include_stop_str else ""
                ending = pb.Ending(reason=pb.FINISH_REASON_STOP, stop_string=stop_string)
        if stop is None and ending is None and len(sequence.tokens) >= sequence.length_limit:
            stop = stop_by_length(sequence)
        if stop is not None:
            ending = pb.Ending(reason=_FINISH_REASONS[stop])
            if stop is Stop.STOP_TOKEN:
                ending.token_id = token
        if ending is not None and text is not None:
            text += live.held_text(sequence.index)
        live.delivery.push(sequence.index, token, text)
        if ending is None:
            return False
        # Tables only grow until a sample ends, so the most blocks are seen here.
        request.note_blocks()
        sequence.ended = True
        live.delivery.end(sequence.index, ending)
        if request.ended:
            self._finish(live)
        return True

    def _advance_beams(self, live: LiveRequest, beams: Beams) -> None:
        """A beam has a new token: once all have, some go on."""
        if not beams.advance():
            return
        live.request.note_blocks()
        if beams.done:
            self._end_samples(live)
            return
        self._forks += beams.forks
        beams.forks = []
        for sample in beams.resumed:
            live.model.queue.resumed(sample)
        beams.resumed = []
        for sample in beams.dropped:
            self._end_sample(live, sample, CloseReason.FINISHED)
        beams.dropped = []
        for lane in self._lanes.values():
            lane.wake()

    def take_forks(self) -> list[tuple[Sequence, list[Sequence]]]:
        """See LaneOwner."""
        forks, self._forks = self._forks, []
        return forks

    def released(self, sequence: Sequence) -> None:
        """See LaneOwner."""
        live = self._live.get(sequence.request.settings.request_id)
        if live is not None:
            self._check_done(live)

    def failed(self, sequence: Sequence, error: QuireError) -> None:
        """See LaneOwner."""
        sequence.ended = True
        live = self._live.get(sequence.request.settings.request_id)
        if live is not None:
            self._abort(live, error)

    def _check_done(self, live: LiveRequest) -> None:
        """Delivers the end when every sample has its last token, and forgets the request when it holds nothing."""
        request = live.request
        if not request.ended:
            return
        self._finish(live)
        if request.released and self._live.pop(request.settings.request_id, None) is not None:
            live.cancel_timers()
            live.released.set()
            live.delivery.release()
            log_finished(live.request, live.outcome)

    def _finish(self, live: LiveRequest) -> None:
        """Delivers the end of a request, all of whose samples have ended."""
        if live.finished:
            return
        request = live.request
        if request.settings.selects:
            if live.beams is not None:
                live.beams.answer(live.delivery)
            else:
                live.delivery.select(best_samples(request.samples, request.settings.answer_count))
        live.finished = True
        live.delivery.finish(usage_of(request))
