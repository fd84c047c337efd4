"""`Keeper`: the one owner of the core in a service process.

Handlers of all RPCs run on one event loop and call the core through the keeper without waiting in between, so commands
never interleave: the loop is the single writer. The keeper also does what the core only asks for: it gets epochs from
the store, tells gateways what changed, has executors fence gateways that are gone, and lets time pass.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
import contextlib
import secrets
import time
from typing import Protocol

import structlog

from memsvc.config import MemsvcConfig
from memsvc.core import invariants
from memsvc.core.lease import CoreEvent, FenceRequired, LeaseRecalled, MergeOffered
from memsvc.core.log import CommandLog
from memsvc.core.memory import MemoryCore
from memsvc.core.registered import RegisteredPool
from memsvc.core.validation import EPOCH_MAXIMUM, PoolRegistration
from memsvc.fences import Fencer
from memsvc.store import HintSpace, ServiceRecord, Store
from quire.errors import InvalidRequestError, InvariantError, QuireError, StaleEpochError, StoreUnavailableError
from quire.memory import BlocksMerged, BlocksRecalled, MemoryEvent, PoolUpdated

log = structlog.get_logger(__name__)

_SWEEPS_PER_TTL = 12
_ANNOUNCEMENTS_PER_TTL = 3


class Listener(Protocol):
    """A connected gateway, as the keeper sees it."""

    def push(self, event: MemoryEvent) -> None:
        """Tells the gateway something; never waits."""
        ...

    def end(self, error: QuireError) -> None:
        """Ends the gateway's stream."""
        ...


class Keeper:
    """Owns the core.

    Args:
        config: settings.
        core: the state machine.
        store: shared metadata, started.
        fail: called when an invariant is broken: the process must stop.
        clock: seconds, never going back.
        changed: called after commands; must not wait.

    Attributes:
        log: the core's accepted commands; None if they are not kept.
    """

    def __init__(
        self,
        config: MemsvcConfig,
        core: MemoryCore,
        store: Store,
        fail: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.core = core
        self.incarnation = secrets.randbits(64) or 1
        self.log = CommandLog(core, config.command_log_mib << 20) if config.command_log_mib else None
        self._store = store
        self._fail = fail
        self._clock = clock
        self._changed = changed
        self._store_losses = store.losses
        self._record: ServiceRecord | None = None
        self._pools_changed = asyncio.Event()
        self._listeners: dict[int, Listener] = {}
        self._fencer = Fencer(config.fence_timeout, self._is_due, self._fence_answered)
        self._registration_lock = asyncio.Lock()
        self._unsaved_epochs: dict[str, int] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self._last_command = 0.0
        self._last_check = 0.0

    @property
    def now(self) -> float:
        """Seconds of the clock that all commands use."""
        return self._clock()

    async def start(self, address: str) -> ServiceRecord:
        """Starts to let time pass, and to announce this service under `address`; returns as what."""
        record = self._record = ServiceRecord("memsvc", self.config.memsvc_id, self.incarnation, address)
        self._tasks = [
            asyncio.create_task(self._sweep(), name="sweep"),
            asyncio.create_task(self._announce(record), name="announce"),
        ]
        return record

    async def close(self) -> None:
        """Stops everything that `start` began."""
        # The store's client may take a cancellation for a server that does not answer: then this ends the loop.
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._fencer.close()
        await self._withdraw()

    # Executors

    async def register_pool(self, registration: PoolRegistration, epoch_floor: int) -> int:
        """Registers a pool and returns its epoch; see `MemoryCore.register_pool`."""
        async with self._registration_lock:
            epoch = self.core.registered_epoch(registration)
            if epoch is None:
                known = self.core.pools.get(registration.executor_id)
                floor = max(epoch_floor, known.epoch if known is not None else 0)
                epoch = await self._next_epoch(registration.executor_id, floor)
            epoch = self.core.register_pool(registration, epoch, self._clock())
        self.deliver()
        return epoch

    async def _next_epoch(self, pool_id: str, floor: int) -> int:
        """Returns an epoch above `floor` and above all that the store knows of."""
        try:
            epoch = await self._store.raise_epoch(pool_id, floor)
        except StoreUnavailableError:
            # The executor's own floor and this process's memory keep it rising; the store hears of it when it is back.
            epoch = floor + 1
            self._unsaved_epochs[pool_id] = epoch
        if epoch > EPOCH_MAXIMUM:
            message = f"epoch_floor: {floor} leaves no higher epoch, the highest is {EPOCH_MAXIMUM}"
            raise InvalidRequestError(message, field="epoch_floor")
        return epoch

    def heartbeat(self, executor_id: str, executor_incarnation: int) -> int:
        """Keeps a pool alive and returns its epoch; see `MemoryCore.heartbeat`."""
        return self.core.heartbeat(executor_id, executor_incarnation, self._clock())

    async def reset_cache(self, pool_id: str, *, force: bool) -> int:
        """Forgets everything that can be matched in a pool; see `MemoryCore.reset_cache`.

        The executor hears of a forced reset's epoch by its next heartbeat; until then it refuses the new sessions.
        """
        async with self._registration_lock:
            pool = self.core.pool(pool_id)
            held = pool.memory.tables.open_count
            epoch = await self._next_epoch(pool_id, pool.epoch) if force and held else 0
            count = self.core.reset_cache(pool_id, self._clock(), epoch)
        log.info("cache_reset", pool_id=pool_id, block_count=count, sequence_count=held, force=force)
        self.deliver()
        return count

    # Gateways

    def connect_gateway(self, gateway_id: str, incarnation: int, listener: Listener) -> int:
        """Admits a gateway and returns its number; `listener` hears what concerns it."""
        number = self.core.connect_gateway(gateway_id, incarnation, self._clock())
        self._listeners[number] = listener
        self.deliver()
        log.info("gateway_connected", gateway_id=gateway_id, gateway_number=number)
        return number

    def disconnect_gateway(self, number: int, *, clean: bool) -> None:
        """Notes the end of a gateway's stream.

        A gateway that said goodbye is fenced at once; one whose stream broke when its lease is over, or when it comes
        back under a new incarnation.
        """
        self._listeners.pop(number, None)
        if clean:
            self.core.disconnect_gateway(number, self._clock())
            self.deliver()
        log.info("gateway_disconnected", gateway_number=number, clean=clean)

    def heard(self) -> None:
        """Does what a request of a gateway asks for, which is mostly nothing, and ends no other gateway's lease."""
        self._last_command = self._clock()
        events = self.core.take_events()
        if events:
            self._carry_out(events)
        self._changed()

    def deliver(self) -> None:
        """Does what the last commands ask for."""
        self._last_command = self._clock()
        self._carry_out(self.core.take_events())
        self._changed()

    def _carry_out(self, events: list[CoreEvent]) -> None:
        for event in events:
            if isinstance(event, FenceRequired):
                self._fencer.add(event)
            elif isinstance(event, LeaseRecalled):
                listener = self._listeners.get(event.gateway_number)
                if listener is not None:
                    listener.push(BlocksRecalled(event.pool_id, event.epoch, event.block_count))
            elif isinstance(event, MergeOffered):
                listener = self._listeners.get(event.gateway_number)
                if listener is not None:
                    listener.push(BlocksMerged(event.pool_id, event.epoch, event.rows))
            else:
                pool = self.core.pool(event.pool_id).info()
                log.info("pool_changed", pool_id=pool.pool_id, epoch=pool.epoch, ready=pool.ready)
                self._pools_changed.set()
                for listener in list(self._listeners.values()):
                    listener.push(PoolUpdated(pool))
        self._end_void_streams()

    def _end_void_streams(self) -> None:
        """Ends the streams of gateways whose lease is over."""
        if not self._listeners:
            return
        live = {gateway.number for gateway in self.core.gateways if not gateway.closed}
        for number in [number for number in self._listeners if number not in live]:
            self._listeners.pop(number).end(StaleEpochError("the lease is over", reason="STALE_GATEWAY"))

    # Fences

    def _is_due(self, fence: FenceRequired) -> bool:
        pool = self.core.pools.get(fence.pool_id)
        return pool is not None and pool.ready and pool.epoch == fence.epoch

    def _fence_answered(self, fence: FenceRequired) -> None:
        self.core.fenced(fence.pool_id, fence.epoch, fence.gateway_number, self._clock())
        self.deliver()

    # Time

    async def _sweep(self) -> None:
        """Ends leases that are over, and checks the invariants while nothing happens."""
        interval = self.config.lease_ttl / _SWEEPS_PER_TTL
        expected = self._clock() + interval
        while True:
            await asyncio.sleep(max(0.0, expected - self._clock()))
            now = self._clock()
            late = now - expected
            if late > interval:
                # This process stood still: what it did not hear in that time is nobody's silence.
                log.warning("sweep_late", late_ms=round(late * 1000))
                self.core.extend_leases(late)
            expected = now + interval
            self.core.expire(now)
            self.deliver_if_any()
            self._check_when_idle(now, interval)
            self._check_log()

    def _check_log(self) -> None:
        """Says so, once, when the log has ended."""
        if self.log is not None and self.log.ended:
            log.warning("command_log_ended", reason=self.log.ended, effect="no history; see --command-log-mib")
            self.log = None

    def deliver_if_any(self) -> None:
        """As `deliver`, but does not count as a command when there is nothing to do."""
        last = self._last_command
        self.deliver()
        self._last_command = last

    def _check_when_idle(self, now: float, interval: float) -> None:
        """Checks all invariants, at most once after each command, when none came for an interval."""
        if not self.config.check_interval or now - self._last_check < self.config.check_interval:
            return
        if self._last_check >= self._last_command or now - self._last_command < interval:
            return
        self._last_check = now
        try:
            invariants.check(self.core)
        except InvariantError as error:
            log.exception("invariant_violated", reason=error.reason)
            self._fail(f"invariant violated: {error.message}")

    async def _announce(self, record: ServiceRecord) -> None:
        """Keeps this service and its executors in the registry, and hands over epochs that the store missed."""
        takeover = True
        while not self._stopping:
            self._pools_changed.clear()
            try:
                if not await self._store.announce(record, self.config.lease_ttl, takeover=takeover):
                    log.warning("service_superseded", memsvc_id=record.name)
                takeover = False
                for pool in list(self.core.pools.values()):
                    executor = _executor_record(pool)
                    if pool.ready:
                        await self._store.announce(executor, self.config.lease_ttl, takeover=True)
                    else:
                        await self._store.withdraw(executor)
                self._note_losses()
                for pool_id, epoch in list(self._unsaved_epochs.items()):
                    await self._store.keep_epoch(pool_id, epoch)
                    self._unsaved_epochs.pop(pool_id, None)
            except StoreUnavailableError:
                # The store has said so once; this loop is what finds out that it is back.
                if self._stopping:
                    return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.config.lease_ttl / _ANNOUNCEMENTS_PER_TTL):
                    await self._pools_changed.wait()

    def _note_losses(self) -> None:
        """Has every epoch stored again if the store has lost its contents."""
        if self._store.losses != self._store_losses:
            self._store_losses = self._store.losses
            self._unsaved_epochs |= {pool_id: pool.epoch for pool_id, pool in self.core.pools.items()}

    async def _withdraw(self) -> None:
        """Takes this service and its executors out of the registry."""
        if self._record is None:
            return
        try:
            for pool in self.core.pools.values():
                await self._store.withdraw(_executor_record(pool))
            await self._store.withdraw(self._record)
        except StoreUnavailableError as error:
            log.info("withdrawal_skipped", reason=error.message, effect="the notes expire")


def _executor_record(pool: RegisteredPool) -> ServiceRecord:
    """Returns the executor of a pool as it is noted in the registry."""
    registration, spec = pool.registration, pool.registration.spec
    space = HintSpace(spec.model_id, spec.block_size, spec.kv_dtype)
    return ServiceRecord(
        "executor", registration.executor_id, registration.executor_incarnation, registration.address, space.text
    )
