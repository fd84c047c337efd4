"""The whole memory service as one state machine: pools, gateways, and the commands on them.

Commands are methods: they return their result, or raise a QuireError and change nothing. What others must be told is
queued as events and taken with `take_events`. One writer at a time; time is an argument, in seconds of a clock that
never goes back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
from types import MappingProxyType

from memsvc.core.admission import AdmitContext
from memsvc.core.commands import Recorder, command
from memsvc.core.events import BlocksStored, CacheEvent
from memsvc.core.journal import Journal
from memsvc.core.lease import CoreEvent, FenceRequired, Gateway, LeaseRecalled, MergeOffered, PoolChanged
from memsvc.core.operator import OperatorCommands
from memsvc.core.pool_memory import RETAINED_SHARE, PoolMemory
from memsvc.core.registered import RegisteredPool
from memsvc.core.roots import Roots
from memsvc.core.tenancy import TenantQuota
from memsvc.core.validation import (
    EPOCH_MAXIMUM,
    TEXT_LENGTH_MAXIMUM,
    PoolRegistration,
    check_admission,
    check_incarnation,
    check_name,
    check_registration,
)
from quire import hashing
from quire.errors import BlockPoolExhaustedError, InvalidRequestError, PoolNotFoundError, StaleEpochError
from quire.memory import Admission, AdmitRequest, Fork, ForkRequest, PoolSpec


class MemoryCore(OperatorCommands):
    """The state machine.

    Args:
        tenant_secret: 16 .. 64 secret bytes from which tenants' salts are derived.
        lease_ttl: seconds of silence after which a gateway or an executor counts as gone.
        block_count_limit: most blocks that a pool may have.
        pool_limit: most pools.
        chain: computes identities; another one only in tests of collisions.
        cache_events: keep what becomes matchable and what ceases to be, for `take_cache_events`.
        forecast: refuse admissions for which there will be no room soon; see `memsvc.core.forecast`.
        quotas: what tenants may hold and keep of every pool that appears, by name.
        retained_share: of each pool, what a tenant may retain if its quota does not say.
        residency_every: follow the life of every n-th block that is taken; 0 for none.

    Attributes:
        log: takes down accepted commands; None for nobody.
        roots: hears of root digests, or knows them; None for nobody.
    """

    def __init__(
        self,
        tenant_secret: bytes,
        *,
        lease_ttl: float = 3.0,
        block_count_limit: int = 2**31 - 1,
        pool_limit: int = 1024,
        chain: Callable[[bytes, bytes | memoryview, int], list[bytes]] = hashing.chain,
        cache_events: bool = False,
        forecast: bool = False,
        quotas: Mapping[str, TenantQuota] = MappingProxyType({}),
        retained_share: float = RETAINED_SHARE,
        residency_every: int = 0,
    ) -> None:
        self.lease_ttl = lease_ttl
        self._quotas = dict(quotas)
        self._retained_share = retained_share
        self._residency_every = residency_every
        self._forecast = forecast
        self._cache_events = cache_events
        self._tenant_secret = tenant_secret
        self._block_count_limit = block_count_limit
        self._pool_limit = pool_limit
        self._chain = chain
        self._pools: dict[str, RegisteredPool] = {}
        self._gateways: dict[int, Gateway] = {}
        self._gateway_by_id: dict[str, Gateway] = {}
        self._gateway_count = 0
        self._admission_count = 0
        self._events: list[CoreEvent] = []
        self.log: Recorder | None = None
        self.roots: Roots | None = None
        self._root = functools.lru_cache(maxsize=4096)(self._compute_root)

    # Looking

    @property
    def pools(self) -> dict[str, RegisteredPool]:
        """The pools by id; not to be changed."""
        return self._pools

    def pool(self, pool_id: str) -> RegisteredPool:
        """Returns a pool; raises PoolNotFoundError."""
        pool = self._pools.get(pool_id)
        if pool is None:
            known = ", ".join(sorted(self._pools)[:8]) or "none"
            raise PoolNotFoundError(f"pool_id: no pool {pool_id[:TEXT_LENGTH_MAXIMUM]!r}; known are {known}")
        return pool

    def gateway(self, number: int) -> Gateway:
        """Returns a gateway that is connected, or whose fences are still under way."""
        gateway = self._gateways.get(number)
        if gateway is None:
            raise StaleEpochError("the gateway's lease is over", reason="STALE_GATEWAY")
        return gateway

    @property
    def gateways(self) -> list[Gateway]:
        """The gateways, those included whose fences are under way."""
        return list(self._gateways.values())

    def take_events(self) -> list[CoreEvent]:
        """Returns what happened since the last call."""
        events, self._events = self._events, []
        return events

    def take_cache_events(self, pool_id: str) -> list[CacheEvent]:
        """Returns what was published and forgotten in a pool since the last call, oldest first.

        A change of the pool's epoch voids everything published before it, and what was not taken by then.
        """
        return self.pool(pool_id).memory.take_cache_events()

    def published(self, pool_id: str, *, with_tokens: bool = True) -> BlocksStored:
        """Returns everything that can be matched in a pool as full blocks."""
        return self.pool(pool_id).memory.published(with_tokens=with_tokens)

    def prefix_root(self, pool_id: str, adapter: str = "", tenant: str = "", cache_salt: str = "") -> bytes:
        """Returns the digest to which the first block of such a sequence is chained."""
        return self._root(self.pool(pool_id).registration.spec, adapter, tenant, cache_salt)[0]

    def locate(self, request: AdmitRequest) -> int:
        """Returns how many leading tokens of a prompt an admission would find in `request.pool_id`; changes nothing.

        Raises:
            PoolNotFoundError, InvalidRequestError: as `admit`.
        """
        pool = self.pool(request.pool_id)
        check_admission(request)
        root, _ = self._root(pool.registration.spec, request.adapter, request.tenant, request.cache_salt)
        return pool.memory.locate(request, root) if pool.ready else 0

    # Executors

    def registered_epoch(self, registration: PoolRegistration) -> int | None:
        """Returns the epoch of a pool that is registered exactly so, or None if `register_pool` is due.

        Raises:
            InvalidRequestError: the geometry is not possible, or not that of this incarnation so far.
            StaleEpochError: a newer incarnation has taken the pool over.
        """
        check_registration(registration, self._block_count_limit)
        pool = self._pools.get(registration.executor_id)
        if pool is None:
            return None
        if registration.executor_incarnation in pool.superseded:
            raise StaleEpochError(
                f"executor_incarnation: a newer incarnation of {registration.executor_id!r} is registered",
                reason="STALE_INCARNATION",
            )
        if not pool.ready or pool.registration.executor_incarnation != registration.executor_incarnation:
            return None
        if pool.registration.spec != registration.spec:
            raise InvalidRequestError("spec: differs from what this executor incarnation registered", field="spec")
        return pool.epoch

    @command()
    def register_pool(self, registration: PoolRegistration, epoch: int, now: float) -> int:
        """Registers a pool and returns its epoch.

        Args:
            registration: the executor.
            epoch: above every epoch that the pool ever had; not used when the pool is registered exactly so.
            now: the caller's clock.

        Raises:
            InvalidRequestError, StaleEpochError: as `registered_epoch`, or `epoch` does not rise.
        """
        known = self.registered_epoch(registration)
        pool = self._pools.get(registration.executor_id)
        if known is not None and pool is not None:
            pool.expires_at = now + self.lease_ttl
            if pool.registration.address != registration.address:
                pool.registration = registration
                self._events.append(PoolChanged(registration.executor_id))
            return known
        if epoch > EPOCH_MAXIMUM or epoch < 1 or (pool is not None and epoch <= pool.epoch):
            raise StaleEpochError(f"epoch: {epoch} does not rise above {pool.epoch if pool else 0}")
        if pool is None and len(self._pools) >= self._pool_limit:
            raise InvalidRequestError(f"executor_id: there are {self._pool_limit} pools already", field="executor_id")
        fresh = RegisteredPool(
            registration=registration,
            epoch=epoch,
            ready=True,
            expires_at=now + self.lease_ttl,
            memory=self._new_memory(registration.spec, epoch),
            quotas=dict(self._quotas) if pool is None else pool.quotas,
        )
        self._install_quotas(fresh)
        if pool is not None:
            fresh.superseded = pool.superseded
            if pool.registration.executor_incarnation != registration.executor_incarnation:
                fresh.superseded.append(pool.registration.executor_incarnation)
        self._pools[registration.executor_id] = fresh
        self._events.append(PoolChanged(registration.executor_id))
        self._forget_fenced_gateways()
        return epoch

    @command()
    def heartbeat(self, executor_id: str, executor_incarnation: int, now: float) -> int:
        """Keeps a pool alive and returns its epoch.

        Raises:
            PoolNotFoundError: unknown or lost; the executor registers again.
            StaleEpochError: another incarnation has taken the pool over.
        """
        pool = self.pool(executor_id)
        if pool.registration.executor_incarnation != executor_incarnation:
            raise StaleEpochError(
                f"executor_incarnation: another incarnation of {executor_id!r} is registered",
                reason="STALE_INCARNATION",
            )
        if not pool.ready:
            raise PoolNotFoundError(
                f"pool {executor_id!r} was lost after {self.lease_ttl} s of silence; register again"
            )
        pool.expires_at = now + self.lease_ttl
        return pool.epoch

    @command()
    def lose_pool(self, pool_id: str) -> None:
        """Ends a pool's epoch: every table, grant and prefix of it is void."""
        pool = self.pool(pool_id)
        pool.ready = False
        pool.epoch += 1
        pool.memory = self._new_memory(pool.registration.spec, pool.epoch)
        self._install_quotas(pool)
        self._events.append(PoolChanged(pool_id))
        self._forget_fenced_gateways()

    # Gateways

    @command()
    def connect_gateway(self, gateway_id: str, incarnation: int, now: float) -> int:
        """Admits a gateway and returns its number. An older incarnation of the same name is void at once.

        Raises:
            InvalidRequestError: the name or the incarnation is not possible.
        """
        check_name(gateway_id, "gateway_id")
        check_incarnation(incarnation, "gateway_incarnation")
        if any(other.incarnation == incarnation for other in self._gateways.values()):
            raise InvalidRequestError("gateway_incarnation: is in use", field="gateway_incarnation")
        older = self._gateway_by_id.get(gateway_id)
        if older is not None:
            self.disconnect_gateway(older.number, now)
        self._gateway_count += 1
        gateway = Gateway(self._gateway_count, gateway_id, incarnation, now + self.lease_ttl)
        self._gateways[gateway.number] = gateway
        self._gateway_by_id[gateway_id] = gateway
        return gateway.number

    @command()
    def touch_gateway(self, number: int, now: float) -> None:
        """Notes that a gateway was heard.

        Raises:
            StaleEpochError: its lease is over.
        """
        self._open_gateway(number).expires_at = now + self.lease_ttl

    @command()
    def disconnect_gateway(self, number: int, now: float) -> None:
        """Ends a gateway's lease: its tables close as soon as the executors have fenced it."""
        gateway = self._gateways.get(number)
        if gateway is None or gateway.closed:
            return
        gateway.closed = True
        if self._gateway_by_id.get(gateway.gateway_id) is gateway:
            del self._gateway_by_id[gateway.gateway_id]
        for pool_id, pool in self._pools.items():
            if pool.memory.begin_closing(number, now):
                self._events.append(
                    FenceRequired(pool_id, pool.epoch, pool.registration.address, number, gateway.incarnation)
                )
        self._forget_fenced_gateways()

    @command()
    def fenced(self, pool_id: str, epoch: int, number: int, now: float) -> None:
        """Takes an executor's answer to a fence: what the gateway held there is free. Ignored if the epoch is over."""
        pool = self._pools.get(pool_id)
        gateway = self._gateways.get(number)
        if pool is None or pool.epoch != epoch or gateway is None or not gateway.closed:
            return
        pool.memory.end_closing(number, now)
        self._forget_fenced_gateways()

    # Requests of gateways

    @command(leaves_traces=BlockPoolExhaustedError)
    def admit(self, number: int, request: AdmitRequest, now: float) -> Admission:
        """Opens a table; see `quire.memory.Memory.admit`. Also raises InvalidRequestError."""
        gateway = self._open_gateway(number)
        pool = self._current(request.pool_id, request.epoch)
        check_admission(request)
        root, tenant_tag = self._root(pool.registration.spec, request.adapter, request.tenant, request.cache_salt)
        context = AdmitContext(gateway.number, root, tenant_tag, self._admission_count)
        try:
            admission = pool.memory.admit(request, context, now)
        except BlockPoolExhaustedError as error:
            short = int(error.metadata["needed_block_count"]) - int(error.metadata["available_block_count"])
            self._recall(pool, short)
            raise
        self._admission_count += 1
        return admission

    @command()
    def fork(self, number: int, request: ForkRequest, now: float) -> Fork:
        """Opens tables that share the beginning of another; see `quire.memory.Memory.fork`."""
        gateway = self._open_gateway(number)
        pool = self._current(request.pool_id, request.epoch)
        forked = pool.memory.fork(gateway.number, request, self._admission_count, now)
        self._admission_count += len(forked.tables)
        return forked

    @command()
    def lease(self, number: int, pool_id: str, epoch: int, granted_total: int, now: float) -> list[int]:
        """Brings the blocks ever granted to a gateway up to `granted_total`; see `quire.memory.Memory.lease`."""
        gateway = self._open_gateway(number)
        return self._current(pool_id, epoch).memory.lease(gateway.number, granted_total, now)

    def granted_total(self, number: int, pool_id: str) -> int:
        """Returns the blocks ever granted to a gateway in the current epoch."""
        grants = self.pool(pool_id).memory.grants.get(number)
        return grants.granted_total if grants is not None else 0

    @command()
    def journal(
        self,
        number: int,
        pool_id: str,
        epoch: int,
        journal: Journal,
        now: float,
        *,
        journal_no: int | None = None,
    ) -> bool:
        """Applies a journal; false if there was nothing to do: its epoch is over, or its number was applied before.

        Args:
            number: the gateway.
            pool_id: the pool.
            epoch: epoch of every table named.
            journal: what happened.
            now: the caller's clock.
            journal_no: 1, 2, 3, ...; None where every journal comes exactly once and in order.

        Raises:
            PoolNotFoundError: no such pool.
            InvalidRequestError: the columns do not fit one another.
            StaleEpochError: a row does not fit, the epoch is not known yet, or a number was left out.
        """
        gateway = self._open_gateway(number)
        pool = self.pool(pool_id)
        if epoch > pool.epoch:
            raise StaleEpochError(f"epoch: {epoch} of pool {pool_id!r} was never granted, it is at {pool.epoch}")
        if journal_no is not None:
            last = gateway.journal_nos.get(pool_id, 0)
            if journal_no <= last:
                return False
            if journal_no != last + 1:
                raise StaleEpochError(f"journal_no: found {journal_no}, expected {last + 1}", reason="JOURNAL_GAP")
        current = epoch == pool.epoch and pool.ready
        if current:
            pool.memory.journal(gateway.number, journal, now)
            pool.memory.grants_of(gateway.number).recalled = 0
            if pool.memory.merge_offers:
                rows, pool.memory.merge_offers = pool.memory.merge_offers, []
                self._events.append(MergeOffered(number, pool_id, epoch, rows))
        if journal_no is not None:
            gateway.journal_nos[pool_id] = journal_no
        return current

    def journal_no(self, number: int, pool_id: str) -> int:
        """Returns the highest journal taken from a gateway for a pool."""
        return self.gateway(number).journal_nos.get(pool_id, 0)

    # Time

    def expire(self, now: float) -> None:
        """Ends the leases of gateways and executors that were silent for too long."""
        for gateway in [gateway for gateway in self._gateways.values() if not gateway.closed]:
            if now >= gateway.expires_at:
                self.disconnect_gateway(gateway.number, now)
        for pool_id, pool in list(self._pools.items()):
            if pool.ready and now >= pool.expires_at:
                self.lose_pool(pool_id)

    @command()
    def extend_leases(self, seconds: float) -> None:
        """Postpones every expiry: this process did not listen for so long."""
        for gateway in self._gateways.values():
            gateway.expires_at += seconds
        for pool in self._pools.values():
            pool.expires_at += seconds

    # Inside

    def _new_memory(self, spec: PoolSpec, epoch: int) -> PoolMemory:
        return PoolMemory(
            spec,
            epoch,
            self._chain,
            cache_events=self._cache_events,
            forecast=self._forecast,
            retained_share=self._retained_share,
            residency_every=self._residency_every,
        )

    def _tenant_tag(self, spec: PoolSpec, tenant: str) -> int:
        return self._root(spec, "", tenant, "")[1]

    def _open_gateway(self, number: int) -> Gateway:
        gateway = self.gateway(number)
        if gateway.closed:
            raise StaleEpochError(
                f"gateway {gateway.gateway_id!r}: the lease of this incarnation is over", reason="STALE_GATEWAY"
            )
        return gateway

    def _current(self, pool_id: str, epoch: int) -> RegisteredPool:
        """Returns a pool that grants blocks in `epoch`."""
        pool = self.pool(pool_id)
        if epoch != pool.epoch or not pool.ready:
            state = "is" if pool.ready else "is lost,"
            raise StaleEpochError(
                f"epoch: {epoch} is not the epoch of pool {pool_id!r}, which {state} at {pool.epoch}",
                metadata={"epoch": pool.epoch},
            )
        return pool

    def _recall(self, pool: RegisteredPool, short: int) -> None:
        """Asks gateways for unused blocks, those with most first, each at most once between its journals."""
        holders = sorted(pool.memory.grants.items(), key=lambda item: (-item[1].leased, item[0]))
        for number, grants in holders:
            if short <= 0:
                return
            if grants.leased and not grants.recalled and not self._gateways[number].closed:
                grants.recalled = min(grants.leased, short)
                short -= grants.recalled
                self._events.append(LeaseRecalled(number, pool.registration.executor_id, pool.epoch, grants.recalled))

    def _forget_fenced_gateways(self) -> None:
        """Drops closed gateways that hold nothing any more."""
        for number in [number for number, gateway in self._gateways.items() if gateway.closed]:
            if not any(number in pool.memory.grants for pool in self._pools.values()):
                del self._gateways[number]

    def _compute_root(self, spec: PoolSpec, adapter: str, tenant: str, cache_salt: str) -> tuple[bytes, int]:
        """Returns the root digest of a sequence and the tag of its tenant."""
        known = self.roots.find(spec, adapter, tenant, cache_salt) if self.roots is not None else None
        if known is not None:
            return known
        salt = hashing.tenant_salt(self._tenant_secret, tenant)
        root = hashing.PrefixRoot(spec.model_id, spec.block_size, spec.kv_dtype, adapter, salt, cache_salt)
        found = root.digest(), int.from_bytes(salt[:4], "little")
        if self.roots is not None:
            self.roots.derived(spec, adapter, tenant, cache_salt, *found)
        return found

    def forget_roots(self) -> None:
        """Has every root derived anew, and told to `roots` again."""
        self._root.cache_clear()
