"""The gateway without its socket: requests in, streams out, one lane for each executor."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
import dataclasses
import time
from typing import TYPE_CHECKING

import structlog

from gateway.accounts import log_finished, usage_of
from gateway.beams import Beams
from gateway.core.precedence import SchedulingPolicy
from gateway.core.queue import WaitingQueue
from gateway.core.request import Request, RequestSettings
from gateway.core.sequence import Sequence, SequenceState
from gateway.core.step import LogprobRow
from gateway.core.stopping import Stop, may_stop, stop_by_length, stop_by_token
from gateway.detokenize import Detokenizer
from gateway.lane import Lane
from gateway.models import ServedModel
from gateway.outputs import best_samples, token_logprob
from gateway.streams import RequestStream
from gateway.tokenize import ModelTokenizer
from protos.execsvc.v1 import execsvc_pb2
from protos.gateway.v1 import gateway_pb2 as pb
from quire.errors import (
    AdmissionError,
    ModelNotFoundError,
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
    from gateway.clients.executor import ExecutorLink
    from gateway.config import GatewayConfig

log = structlog.get_logger(__name__)

_DRAIN_POLL_SECONDS = 0.02
_FINISH_REASONS = {
    Stop.EOS: pb.FINISH_REASON_EOS,
    Stop.STOP_TOKEN: pb.FINISH_REASON_STOP,
    Stop.CONTEXT: pb.FINISH_REASON_CONTEXT,
    Stop.LENGTH: pb.FINISH_REASON_LENGTH,
}


@dataclasses.dataclass(slots=True)
class _Model:
    """A model and the requests that wait for it."""

    served: ServedModel
    queue: WaitingQueue


@dataclasses.dataclass(slots=True)
class _Live:
    """A live request: its stream, the text of its samples, and the timer of its stay in the queue."""

    stream: RequestStream
    detokenizers: list[Detokenizer]
    model: _Model
    stop_tokens: frozenset[int]
    """Tokens that may end a sample."""
    stops_late: bool
    """Whether no sample may end before some tokens (`min_tokens`)."""
    timer: asyncio.TimerHandle | None = None
    """Of its stay in the queue."""
    limit_timer: asyncio.TimerHandle | None = None
    """Of its time limit."""

    prompt: pb.PromptLogprobs = dataclasses.field(default_factory=pb.PromptLogprobs)
    """Log-probabilities of the prompt, as far as they are known."""
    beams: Beams | None = None
    """Of a beam search."""

    def cancel_timers(self) -> None:
        """Stops both timers."""
        for timer in (self.timer, self.limit_timer):
            if timer is not None:
                timer.cancel()


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
        self._models: dict[str, _Model] = {}
        self._lanes: dict[str, Lane] = {}
        self._lane_models: dict[str, str] = {}
        self._pools: dict[str, PoolInfo] = {}
        self._live: dict[str, _Live] = {}
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
            live.stream.fail(NotReadyError("the gateway is shutting down", reason="DRAINING"))
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
        )
        if known is None:
            policy = SchedulingPolicy(self._config.scheduling_policy)
            self._models[info.name] = _Model(served, WaitingQueue(self._config.max_queue_size, policy))
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

    def models(self) -> list[ServedModel]:
        """Returns the models served, by name."""
        return [self._models[name].served for name in sorted(self._models)]

    def find_model(self, name: str) -> ServedModel:
        """Returns the model of this name; an empty name means the only one.

        Raises:
            NotReadyError: draining, or no executor has come yet.
            ModelNotFoundError: no such model, or an empty name and several models.
        """
        if self._draining:
            raise NotReadyError("the gateway is draining; try another one", reason="DRAINING", retry_after=1.0)
        if not self._models:
            raise NotReadyError("no executor is connected yet; try again soon", retry_after=1.0)
        if not name and len(self._models) == 1:
            return next(iter(self._models.values())).served
        if name not in self._models:
            served = ", ".join(sorted(self._models))
            raise ModelNotFoundError(f"model: found {name!r}, served here: {served}", field="model")
        return self._models[name].served

    # --- requests -----------------------------------------------------------------------------------------------

    def check_request(self, request_id: str, model: str) -> None:
        """Raises RequestExistsError if a live request has this id, AdmissionError if the model's queue is full."""
        if request_id in self._live:
            raise RequestExistsError(f"request_id: {request_id!r} is the id of a live request", field="request_id")
        self._models[model].queue.check_room()

    def submit(self, settings: RequestSettings) -> RequestStream:
        """Queues a request.

        Raises:
            RequestExistsError: its id is live.
            AdmissionError: the queue is full.
            NotReadyError: draining.
        """
        if self._draining:
            raise NotReadyError("the gateway is draining; try another one", reason="DRAINING", retry_after=1.0)
        self.check_request(settings.request_id, settings.model)
        model = self._models[settings.model]
        request = Request(settings, model.served.max_model_len, time.monotonic(), self._config.priority_ageing)
        model.queue.push_request(request)
        token_bytes = model.served.tokenizer.token_bytes
        detokenizers = [Detokenizer(token_bytes, settings.stop) for _ in request.samples]
        stop_tokens = settings.eos_token_ids | settings.stop_token_ids
        live = _Live(RequestStream(request), detokenizers, model, stop_tokens, settings.min_tokens > 0)
        loop = asyncio.get_running_loop()
        live.timer = loop.call_later(settings.max_queue_time, self._queue_timeout, settings.request_id)
        if settings.time_limit:
            live.limit_timer = loop.call_later(settings.time_limit, self._time_limit, settings.request_id)
        if settings.beam is not None:
            live.beams = Beams(request, token_bytes)
        self._live[settings.request_id] = live
        for lane in self._lanes.values():
            lane.wake()
        return live.stream

    def _queue_timeout(self, request_id: str) -> None:
        """The request has waited too long."""
        live = self._live.get(request_id)
        if live is None or live.stream.request.admitted_at is not None:
            return
        waited = live.stream.request.settings.max_queue_time
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
        for sample in live.stream.request.samples:
            if not sample.ended:
                ending = pb.Ending(reason=pb.FINISH_REASON_TIME_LIMIT)
                held = "" if live.beams is not None else live.detokenizers[sample.index].flush()
                live.stream.end(sample.index, ending, held)
        self._end_samples(live)

    async def cancel(self, request_id: str, tenant: str = "") -> bool:
        """Cancels a request of a tenant and waits until its blocks are back; returns whether it was live."""
        live = self._live.get(request_id)
        if live is None or live.stream.request.settings.tenant != tenant:
            return False
        live.stream.request.cancelled = True
        for sample in live.stream.request.samples:
            if not sample.ended:
                live.stream.end(sample.index, pb.Ending(reason=pb.FINISH_REASON_CANCELLED))
        self._end_samples(live)
        await live.stream.wait_released()
        await self._memory.flush()
        return True

    def abandon(self, stream: RequestStream) -> None:
        """The client is gone: what is left of its request is cancelled. A no-op for one that has ended."""
        live = self._live.get(stream.request.settings.request_id)
        if live is not None and live.stream is stream and not stream.request.ended:
            stream.request.cancelled = True
            self._end_samples(live)

    def _abort(self, live: _Live, error: QuireError) -> None:
        """Ends a request with an error."""
        live.stream.fail(error)
        self._end_samples(live)

    def _end_samples(self, live: _Live) -> None:
        """Ends every sample that has not: queued ones at once, running ones through the next step."""
        live.stream.request.note_blocks()
        for sample in live.stream.request.samples:
            self._end_sample(live, sample, CloseReason.CANCELLED)
        self._check_done(live)

    def _end_sample(self, live: _Live, sample: Sequence, reason: CloseReason) -> None:
        """Ends a sample that has not: a queued one at once, a running one through the next step."""
        if not sample.ended:
            sample.ended = True
            if sample.state is SequenceState.NEW:
                sample.state = SequenceState.FINISHED
            elif sample.state is SequenceState.WAITING:
                # One that is not in the queue is just being admitted; its lane sees that it has ended.
                if live.model.queue.remove(sample):
                    sample.state = SequenceState.FINISHED
            else:
                for lane in self._lanes.values():
                    lane.finish(sample, reason)

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
            live.stream.prompt_logprobs(live.prompt)
        event.queue_time.FromNanoseconds(int((request.admitted_at - request.arrived_at) * 1e9))
        live.stream.admitted(event)

    def logprobs(self, sequence: Sequence, row: LogprobRow) -> None:
        """See LaneOwner: streams them with the token, or with the prompt once all of it is there."""
        request = sequence.request
        settings = request.settings
        live = self._live[settings.request_id]
        token_bytes = live.model.served.tokenizer.token_bytes
        if live.beams is not None:
            live.beams.note(sequence, row)
        elif row.position >= sequence.prompt_length:
            sequence.cumulative_logprob += row.values[0]
            if settings.logprobs is not None:
                live.stream.push_logprob(sequence.index, token_logprob(row, settings.logprobs, token_bytes))
        elif row.position == request.known_prompt_logprobs + 1:
            # What is computed again after a preemption was there before.
            request.known_prompt_logprobs = row.position
            live.prompt.tokens.append(token_logprob(row, settings.prompt_logprobs or 0, token_bytes))
            if not request.wants_prompt_logprobs:
                live.stream.prompt_logprobs(live.prompt)

    def token(self, sequence: Sequence, token: int) -> bool:
        """See LaneOwner: streams the token and decides whether it is the last."""
        request = sequence.request
        settings = request.settings
        live = self._live[settings.request_id]
        if request.first_token_at is None:
            request.first_token_at = time.monotonic()
            if settings.echo:
                live.stream.begin(live.model.served.tokenizer.token_bytes.text(settings.prompt))
        if live.beams is not None:
            self._advance_beams(live, live.beams)
            return False
        detokenizer = live.detokenizers[sequence.index]
        ending: pb.Ending | None = None
        text = ""
        stop = stop_by_token(sequence) if token in live.stop_tokens else None
        if stop is None or (stop is Stop.STOP_TOKEN and settings.include_stop_str):
            may = stop is None and (not live.stops_late or may_stop(sequence))
            text, stop_string = detokenizer.push(token, may_stop=may)
            if stop_string is not None:
                text += stop_string if settings.include_stop_str else ""
                ending = pb.Ending(reason=pb.FINISH_REASON_STOP, stop_string=stop_string)
            elif stop is None and len(sequence.tokens) >= sequence.length_limit:
                stop = stop_by_length(sequence)
        if stop is not None:
            ending = pb.Ending(reason=_FINISH_REASONS[stop])
            if stop is Stop.STOP_TOKEN:
                ending.token_id = token
        if ending is not None:
            text += detokenizer.flush()
        live.stream.push(sequence.index, text, token)
        if ending is None:
            return False
        # Tables only grow until a sample ends, so the most blocks are seen here.
        request.note_blocks()
        sequence.ended = True
        live.stream.end(sequence.index, ending)
        if request.ended:
            self._finish(live)
        return True

    def _advance_beams(self, live: _Live, beams: Beams) -> None:
        """A beam has a new token: once all have, some go on."""
        if not beams.advance():
            return
        live.stream.request.note_blocks()
        if beams.done:
            self._end_samples(live)
            return
        self._forks += beams.forks
        beams.forks = []
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

    def _check_done(self, live: _Live) -> None:
        """Delivers the end when every sample has its last token, and forgets the request when it holds nothing."""
        request = live.stream.request
        if not request.ended:
            return
        self._finish(live)
        if request.released and self._live.pop(request.settings.request_id, None) is not None:
            live.cancel_timers()
            live.stream.release()
            log_finished(live.stream)

    def _finish(self, live: _Live) -> None:
        """Delivers the end of a request, all of whose samples have ended."""
        request = live.stream.request
        if request.settings.selects and not live.stream.finished:
            if live.beams is not None:
                live.beams.answer(live.stream)
            else:
                live.stream.select(best_samples(request.samples, request.settings.answer_count))
        live.stream.finish(usage_of(live.stream.request))
