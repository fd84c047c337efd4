"""The executor as gateways and memsvc see it, free of any transport: the servicer and the in-process face translate."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
import dataclasses
import functools
import hashlib
import itertools
import secrets

import structlog

from execsvc import events
from execsvc.config import ExecsvcConfig
from execsvc.engine import PendingStep
from execsvc.engine_thread import EngineThread
from execsvc.loading import LoadedModel
from protos.execsvc.v1 import execsvc_pb2 as pb
from protos.memsvc.v1 import memsvc_pb2
from quire import columns
from quire.errors import NotReadyError, QuireError, StaleEpochError, UnsupportedError

log = structlog.get_logger(__name__)

_FENCED_LIMIT = 65536


@dataclasses.dataclass(slots=True, eq=False)
class PlanStream:
    """One gateway's stream of plans."""

    stream_id: int
    gateway_id: str
    gateway_incarnation: int
    epoch: int
    next_step: int = 1
    ended: QuireError | None = None
    """Why the stream is over, once it is: every later plan is refused with it."""
    on_end: Callable[[], None] | None = None
    """Called once when the stream is ended from outside."""

    def end(self, error: QuireError) -> None:
        """Ends the stream. The first cause stays."""
        if self.ended is None:
            self.ended = error
            if self.on_end is not None:
                self.on_end()


class Executor:
    """One incarnation of an executor. All methods run on one event loop; the engine has a thread of its own.

    Life: constructed while loading, `become_ready` once the model is there, `begin_epoch` at each registration.
    """

    def __init__(self, config: ExecsvcConfig, on_defect: Callable[[BaseException], None]) -> None:
        """Draws the incarnation. `on_defect` hears of what must end the process."""
        self._config = config
        self.executor_id = config.executor_id
        self.incarnation = secrets.randbits(64) or 1
        self.load_progress = 0.0
        self._loaded: LoadedModel | None = None
        self._thread = EngineThread(on_defect)
        self._epoch = 0
        self._streams: set[PlanStream] = set()
        self._drops: set[asyncio.Task[list[int]]] = set()
        self._stream_ids = itertools.count(1)
        # Insertion-ordered: the oldest are forgotten first. An incarnation is random and comes back only by replay.
        self._fenced: dict[int, None] = {}

    @property
    def epoch(self) -> int:
        """Epoch granted by memsvc; 0 before the registration."""
        return self._epoch

    @property
    def loaded(self) -> LoadedModel:
        """The model; raises NotReadyError while it is loading."""
        if self._loaded is None:
            raise NotReadyError(f"the model is loading ({self.load_progress:.0%})", retry_after=1.0)
        return self._loaded

    def become_ready(self, loaded: LoadedModel) -> None:
        """Takes the loaded model."""
        self._loaded = loaded
        self.load_progress = 1.0

    async def begin_epoch(self, epoch: int) -> None:
        """Accepts an epoch: tables of older ones are dropped, streams of older ones end."""
        if epoch <= self._epoch:
            return
        self._epoch = epoch
        for stream in list(self._streams):
            stream.end(StaleEpochError(f"epoch {stream.epoch} is over, the executor is in {epoch}"))
        await self._thread.call(self._enter_epoch, epoch)
        log.info(events.EPOCH_BEGUN, epoch=epoch)

    def _enter_epoch(self, epoch: int) -> None:
        """Takes the engine to an epoch, on its thread, once nothing of an older one can write any more."""
        self.loaded.engine.begin_epoch(epoch)
        self.loaded.engine.settle()

    def describe(self) -> pb.DescribeResponse:
        """Returns what runs here."""
        response = pb.DescribeResponse(
            executor_id=self.executor_id,
            executor_incarnation=self.incarnation,
            ready=self._loaded is not None and self._epoch > 0,
            load_progress=self.load_progress,
            epoch=self._epoch,
        )
        if self._loaded is not None:
            loaded = self._loaded
            response.model.CopyFrom(_model_info(loaded))
            response.pool.CopyFrom(self.pool_spec())
            response.device = loaded.device
            response.attention_backend = loaded.attention_backend
            response.batch_invariant = loaded.batch_invariant
            response.max_num_batched_tokens = loaded.max_num_batched_tokens
            response.max_num_seqs = loaded.max_num_seqs
            response.swap_slot_count = loaded.engine.swap_slot_count
            response.swap_out_bytes_per_second, response.swap_in_bytes_per_second = loaded.swap_rates
        return response

    def pool_spec(self) -> memsvc_pb2.PoolSpec:
        """Returns the pool as it is registered; raises NotReadyError while loading."""
        loaded = self.loaded
        return memsvc_pb2.PoolSpec(
            block_count=loaded.budget.block_count,
            block_size=loaded.budget.block_size,
            bytes_per_block=loaded.budget.bytes_per_block,
            model_id=loaded.name,
            kv_dtype=loaded.kv_dtype,
            max_model_len=loaded.budget.max_model_len,
            sliding_window=loaded.engine.window,
        )

    def tokenizer(self) -> tuple[str, str, str, str]:
        """Returns (chat template, bos token, eos token, tokenizer.json).

        Raises:
            NotReadyError: loading.
            UnsupportedError: there is none: the weights are dummies of a bare configuration.
        """
        files = self.loaded.tokenizer
        if files is None:
            raise UnsupportedError(
                "model: dummy weights of a bare config.json have no tokenizer, so text cannot be served; put a "
                "tokenizer.json beside it",
                field="model",
            )
        return files.chat_template, files.bos_token, files.eos_token, files.json

    def open_stream(self, request: pb.Open) -> PlanStream:
        """Opens a stream of plans.

        Raises:
            NotReadyError: loading, or not registered.
            StaleEpochError: another incarnation or epoch, or a gateway that was fenced.
        """
        _ = self.loaded  # Raises while the model is loading.
        if self._epoch == 0:
            raise NotReadyError("the executor is not registered with memsvc yet", retry_after=1.0)
        if request.executor_incarnation != self.incarnation:
            raise StaleEpochError("executor_incarnation: the executor has restarted")
        if request.epoch != self._epoch:
            raise StaleEpochError(f"epoch: {request.epoch} was asked for, the executor is in {self._epoch}")
        if request.gateway_incarnation in self._fenced:
            raise StaleEpochError("gateway_incarnation: this incarnation is fenced; connect to memsvc again")
        stream = PlanStream(next(self._stream_ids), request.gateway_id, request.gateway_incarnation, request.epoch)
        self._streams.add(stream)
        log.info(events.GATEWAY_CONNECTED, gateway_id=request.gateway_id, stream_id=stream.stream_id)
        return stream

    async def end_session(self, gateway_incarnation: int) -> None:
        """Ends the earlier streams of a gateway that opens a new one.

        Returns when no step of them can write any more: the gateway closes their tables on the strength of `Opened`.
        """
        for stream in [found for found in self._streams if found.gateway_incarnation == gateway_incarnation]:
            await self.close_stream(stream)

    async def submit(self, stream: PlanStream, plan: pb.StepPlan) -> asyncio.Future[pb.StepResult]:
        """Hands a plan to the engine and returns a future of its result. Plans run in the order of the calls.

        Raises:
            StaleEpochError: the stream is over, or the plan is out of order.
        """
        if stream.ended is not None:
            raise stream.ended
        if plan.step != stream.next_step:
            raise StaleEpochError(f"step: {plan.step} came where {stream.next_step} was expected")
        stream.next_step += 1
        return await self._thread.submit_halves(
            functools.partial(self._begin, stream, plan), self.loaded.engine.collect
        )

    def _begin(self, stream: PlanStream, plan: pb.StepPlan) -> PendingStep:
        """Submits a plan, on the engine's thread. A stream that was ended meanwhile changes nothing any more."""
        if stream.ended is not None:
            raise stream.ended
        return self.loaded.engine.submit(plan, stream.stream_id)

    async def close_stream(self, stream: PlanStream) -> None:
        """Ends a stream; drops its sequences after the step in flight, even if the caller is cancelled meanwhile."""
        if stream not in self._streams:
            return
        self._streams.discard(stream)
        stream.end(StaleEpochError("the stream is closed"))
        log.info(events.GATEWAY_DISCONNECTED, gateway_id=stream.gateway_id, stream_id=stream.stream_id)
        drop = asyncio.create_task(self._thread.call(self._drop, [stream.stream_id]), name="drop-stream")
        self._drops.add(drop)
        drop.add_done_callback(self._drops.discard)
        await asyncio.shield(drop)

    async def fence(self, request: pb.FenceRequest) -> pb.FenceResponse:
        """Refuses gateways and epochs from now on; returns when nothing in flight can write to their blocks."""
        for incarnation in request.gateway_incarnations:
            self._fenced[incarnation] = None
            log.info(events.GATEWAY_FENCED, gateway_incarnation=incarnation)
        while len(self._fenced) > _FENCED_LIMIT:
            del self._fenced[next(iter(self._fenced))]
        ended = [stream for stream in self._streams if stream.gateway_incarnation in self._fenced]
        for stream in ended:
            stream.end(StaleEpochError("gateway_incarnation: this incarnation is fenced"))
        if self._loaded is None:
            return pb.FenceResponse(epoch=self._epoch)
        if request.epoch_floor > self._epoch:
            await self.begin_epoch(request.epoch_floor)
        open_tables = await self._thread.call(self._drop, [stream.stream_id for stream in ended])
        return pb.FenceResponse(epoch=self._epoch, open_tables=columns.pack(open_tables))

    def _drop(self, stream_ids: list[int]) -> list[int]:
        """Drops the sequences of streams, on the engine's thread; returns the tables that stay open.

        When it returns, nothing that was dropped can write any more.
        """
        engine = self.loaded.engine
        for stream_id in stream_ids:
            engine.drop_owner(stream_id)
        engine.settle()
        return engine.open_tables

    async def open_tables(self) -> list[int]:
        """Returns the tables that are open."""
        return [] if self._loaded is None else await self._thread.call(self._drop, [])

    async def close(self) -> None:
        """Ends every stream and the engine's thread."""
        for stream in list(self._streams):
            stream.end(NotReadyError("the executor is stopping", reason="DRAINING"))
        await asyncio.gather(*self._drops, return_exceptions=True)
        await self._thread.close()


def _model_info(loaded: LoadedModel) -> pb.ModelInfo:
    """Returns what gateways need to know of the model."""
    tokenizer, defaults = loaded.tokenizer, loaded.sampling_defaults
    return pb.ModelInfo(
        name=loaded.name,
        architecture=loaded.architecture,
        vocab_size=loaded.vocab_size,
        max_model_len=loaded.budget.max_model_len,
        eos_token_ids=tokenizer.eos_token_ids if tokenizer is not None else (),
        bos_token_id=tokenizer.bos_token_id if tokenizer is not None else None,
        add_bos_token=tokenizer is not None and tokenizer.add_bos_token,
        parameter_count=loaded.parameter_count,
        dtype=loaded.dtype,
        default_sampling=pb.DefaultSampling(**dataclasses.asdict(defaults)) if defaults.named() else None,
    )


def tokenizer_digest(tokenizer_json: str) -> bytes:
    """Returns the SHA-256 of tokenizer.json, as GetTokenizer carries it."""
    return hashlib.sha256(tokenizer_json.encode()).digest()
