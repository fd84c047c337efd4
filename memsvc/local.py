"""`LocalMemory`: the memory service inside the gateway's own process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
import secrets
import time

import structlog

from memsvc.core.journal import COLUMNS, PackedJournal
from memsvc.core.lease import FenceRequired, LeaseRecalled, MergeOffered
from memsvc.core.log import CommandLog
from memsvc.core.memory import MemoryCore
from memsvc.core.validation import PoolRegistration
from quire.columns import pack
from quire.errors import InvalidRequestError, MemoryUnavailableError
from quire.memory import (
    Admission,
    AdmitRequest,
    BlocksMerged,
    BlocksRecalled,
    Fork,
    ForkRequest,
    JournalEntry,
    MemoryEvent,
    MemoryListener,
    PoolSpec,
    PoolUpdated,
)

log = structlog.get_logger(__name__)

_U32_MAXIMUM = 2**32 - 1

Fence = Callable[[str, int], Awaitable[None]]


def new_core() -> MemoryCore:
    """Returns a core for one process: its secret is random, and nobody's lease ends by silence."""
    return MemoryCore(secrets.token_bytes(32), lease_ttl=float("inf"), forecast=True)


class LocalMemory:
    """Implements `quire.memory.Memory` on a core in this process.

    Args:
        core: the state machine, which only this object commands.
        gateway_id: name of the gateway.
        fence: called with (pool_id, gateway incarnation) when the gateway closes while it holds blocks; returns when
            the executor writes to none of them any more. Without it the executor has stopped before `close` is called.
        clock: seconds, never going back.
        log_bytes: memory for a log of the core's commands; 0 for none.

    Attributes:
        core: the state machine.
        log: the core's accepted commands; None if they are not kept.
    """

    def __init__(
        self,
        core: MemoryCore | None = None,
        *,
        gateway_id: str = "local",
        fence: Fence | None = None,
        clock: Callable[[], float] = time.monotonic,
        log_bytes: int = 0,
    ) -> None:
        self.core = core if core is not None else new_core()
        self.log = CommandLog(self.core, log_bytes) if log_bytes else None
        self._gateway_id = gateway_id
        self._fence = fence
        self._clock = clock
        self._incarnation = 0
        self._number = 0
        self._listener: MemoryListener | None = None

    @property
    def gateway_incarnation(self) -> int:
        """Incarnation of this connection."""
        return self._incarnation

    def register_pool(self, executor_id: str, executor_incarnation: int, address: str, spec: PoolSpec) -> int:
        """Registers the pool of an executor in this process and returns its epoch; see `RegisterPool` of the protocol.

        Raises:
            InvalidRequestError: the geometry is not possible.
            StaleEpochError: a newer incarnation is registered.
        """
        registration = PoolRegistration(executor_id, executor_incarnation, address, spec)
        known = self.core.pools.get(executor_id)
        epoch = self.core.register_pool(registration, known.epoch + 1 if known else 1, self._clock())
        self._deliver()
        return epoch

    async def start(self, listener: MemoryListener) -> None:
        """Connects; `listener` hears of every pool before this returns."""
        self._incarnation = secrets.randbits(64) or 1
        self._number = self.core.connect_gateway(self._gateway_id, self._incarnation, self._clock())
        self._deliver()
        self._listener = listener
        for pool in self.core.pools.values():
            listener(PoolUpdated(pool.info()))

    async def close(self) -> None:
        """Disconnects; what was granted is fenced, then free."""
        if self._listener is None:
            return
        self._listener = None
        self.core.disconnect_gateway(self._number, self._clock())
        for event in self.core.take_events():
            if isinstance(event, FenceRequired):
                if self._fence is not None:
                    await self._fence(event.pool_id, event.gateway_incarnation)
                self.core.fenced(event.pool_id, event.epoch, event.gateway_number, self._clock())

    async def admit(self, request: AdmitRequest) -> Admission:
        """Opens a table; see `quire.memory.Memory.admit`."""
        self._require_open()
        try:
            return self.core.admit(self._number, request, self._clock())
        finally:
            self._deliver()

    async def fork(self, request: ForkRequest) -> Fork:
        """Opens tables that share the beginning of another; see `quire.memory.Memory.fork`."""
        self._require_open()
        return self.core.fork(self._number, request, self._clock())

    async def lease(self, pool_id: str, epoch: int, granted_total: int) -> list[int]:
        """Grants blocks to grow with; see `quire.memory.Memory.lease`."""
        self._require_open()
        return self.core.lease(self._number, pool_id, epoch, granted_total, self._clock())

    def journal(self, entry: JournalEntry) -> None:
        """Records what happened, at once. An entry of an epoch that is over is ignored.

        Raises:
            InvalidRequestError, StaleEpochError: the entry does not fit; nothing was changed.
        """
        self._require_open()
        self.core.journal(self._number, entry.pool_id, entry.epoch, packed(entry), self._clock())
        self._deliver()

    async def flush(self) -> None:
        """Returns at once: every journal is applied when it is written."""

    def lose_pool(self, pool_id: str) -> None:
        """Ends a pool's epoch: its executor has failed."""
        self.core.lose_pool(pool_id)
        self._deliver()

    def reset_cache(self, pool_id: str, *, force: bool) -> int:
        """Forgets everything that can be matched in a pool; see `MemoryCore.reset_cache`."""
        epoch = self.core.pool(pool_id).epoch + 1 if force else 0
        count = self.core.reset_cache(pool_id, self._clock(), epoch)
        self._deliver()
        return count

    def _require_open(self) -> None:
        if self._listener is None:
            raise MemoryUnavailableError("this memory is not started, or closed")

    def _deliver(self) -> None:
        """Tells the listener what the last command brought about."""
        for event in self.core.take_events():
            message: MemoryEvent
            if isinstance(event, FenceRequired):
                # Only `close` of this gateway ends a lease here, and it takes its own events.
                log.error("fence_dropped", pool_id=event.pool_id)
                continue
            if isinstance(event, LeaseRecalled):
                message = BlocksRecalled(event.pool_id, event.epoch, event.block_count)
            elif isinstance(event, MergeOffered):
                message = BlocksMerged(event.pool_id, event.epoch, event.rows)
            else:
                message = PoolUpdated(self.core.pool(event.pool_id).info())
            if self._listener is not None:
                self._listener(message)


def packed(entry: JournalEntry) -> PackedJournal:
    """Returns an entry as the core takes it.

    Raises:
        InvalidRequestError: a value is not a u32.
    """
    try:
        return PackedJournal(
            tables=pack(entry.tables),
            token_starts=pack(entry.token_starts),
            token_counts=pack(entry.token_counts),
            written_counts=pack(entry.written_counts),
            token_ids=pack(entry.token_ids),
            appended=pack(entry.appended) if entry.appended else b"",
            closed=pack(entry.closed) if entry.closed else b"",
            close_reasons=pack(entry.close_reasons) if entry.close_reasons else b"",
            returned=pack(entry.returned) if entry.returned else b"",
            replaced=pack(entry.replaced) if entry.replaced else b"",
        )
    except OverflowError:
        for name in COLUMNS:
            for value in getattr(entry, name):
                if not 0 <= value <= _U32_MAXIMUM:
                    message = f"{name}: found {value}, allowed are 0 .. {_U32_MAXIMUM}"
                    raise InvalidRequestError(message, field=name) from None
        raise
