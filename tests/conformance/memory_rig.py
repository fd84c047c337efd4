"""The memory service under test, in this process or behind gRPC, with one face.

A `Rig` has one pool and any number of gateways. After every command of a gateway all invariants of the core are
checked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
import contextlib
import dataclasses
import itertools
from typing import Any

import grpc

from memsvc import translate
from memsvc.admin import AdminServicer
from memsvc.config import MemsvcConfig
from memsvc.core import invariants
from memsvc.core.log import CommandLog
from memsvc.core.memory import MemoryCore
from memsvc.core.replay import decode_entry, encode_entry, replay
from memsvc.core.snapshot import digest
from memsvc.local import LocalMemory
from memsvc.server import MemsvcServer
from protos.execsvc.v1 import execsvc_pb2, execsvc_pb2_grpc
from protos.memsvc.v1 import admin_pb2, admin_pb2_grpc, memsvc_pb2, memsvc_pb2_grpc
from quire import status
from quire.memory import (
    Admission,
    AdmitRequest,
    BlocksMerged,
    CloseReason,
    Fork,
    ForkRequest,
    JournalEntry,
    PoolSpec,
)
from quire.rpc import SERVER_OPTIONS, open_channel
from tests.conformance.memory_connections import (
    POOL_ID,
    TIMEOUT,
    Connection,
    LocalConnection,
    StreamConnection,
    pack,
    spec,
)


class FenceRecorder(execsvc_pb2_grpc.ExecutorServiceServicer):
    """An executor of which only Fence is real."""

    def __init__(self) -> None:
        self.fenced: list[int] = []
        self.allowed = asyncio.Event()
        self.allowed.set()

    async def Fence(self, request: Any, context: Any) -> Any:  # noqa: N802, D102
        await self.allowed.wait()
        self.fenced.extend(request.gateway_incarnations)
        return execsvc_pb2.FenceResponse()

    async def Describe(self, request: Any, context: Any) -> Any:  # noqa: N802, D102
        raise NotImplementedError

    async def GetTokenizer(self, request: Any, context: Any) -> Any:  # noqa: N802, D102
        raise NotImplementedError

    async def Run(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802, D102
        raise NotImplementedError


class RigSequence:
    """A sequence as a gateway runs it: it keeps what it told, and tells what comes next."""

    def __init__(self, rig: Rig, connection: Connection, tokens: list[int], admission: Admission) -> None:
        self._rig = rig
        self._connection = connection
        self.tokens = list(tokens)
        self.admission = admission
        self.table = admission.table
        self.blocks = list(admission.block_ids)

    async def write(self, count: int | None = None) -> None:
        """Reports `count` tokens as written, all by default."""
        written = len(self.tokens) if count is None else count
        await self._tell(
            tables=[self.table], token_starts=[len(self.tokens)], token_counts=[0], written_counts=[written]
        )

    async def extend(self, tokens: Sequence[int], *, written: int | None = None) -> None:
        """Adds tokens, growing as needed, and reports `written` (all by default)."""
        start = len(self.tokens)
        self.tokens.extend(tokens)
        needed = -(-len(self.tokens) // self._rig.spec.block_size) - len(self.blocks)
        appended: list[int] = []
        for block in await self._rig.grow(self._connection, needed):
            appended += [self.table, len(self.blocks), block]
            self.blocks.append(block)
        await self._tell(
            tables=[self.table],
            token_starts=[start],
            token_counts=[len(tokens)],
            token_ids=list(tokens),
            written_counts=[len(self.tokens) if written is None else written],
            appended=appended,
        )

    async def fork(self, count: int = 1, at_token: int = 0, **fields: Any) -> list[RigSequence]:
        """Opens sequences that share the first `at_token` tokens, all that are written by default."""
        request = ForkRequest(POOL_ID, self._rig.epoch, self.table, count, at_token, **fields)
        try:
            forked = await self._connection.fork(request)
        finally:
            self._rig.check()
        return [self._child(forked, table) for table in forked.tables]

    def _child(self, forked: Fork, table: int) -> RigSequence:
        admission = Admission(forked.epoch, table, forked.block_ids, forked.token_count, [])
        return RigSequence(self._rig, self._connection, self.tokens[: forked.token_count], admission)

    async def replace(self, index: int = -1, block: int = 0) -> int:
        """Reports a leased block in the place of the one at `index`, the last by default; returns the old one."""
        at = index % len(self.blocks)
        old, self.blocks[at] = self.blocks[at], block or (await self._rig.grow(self._connection, 1))[0]
        await self._tell(replaced=[self.table, at, self.blocks[at]])
        return old

    async def close(self, reason: CloseReason = CloseReason.FINISHED) -> None:
        """Reports the table fenced and closed."""
        await self._tell(closed=[self.table], close_reasons=[reason])

    async def _tell(self, **fields: Any) -> None:
        await self._rig.journal(self._connection, **fields)


class Rig:
    """The memory service under test with one pool."""

    def __init__(self, kind: str, core: MemoryCore, admin: Any, connect: Callable[[str], Connection]) -> None:
        self.kind = kind
        self.core = core
        self.admin = admin
        self.connect_raw = connect
        self.spec = spec()
        self.epoch = 0
        self.log: CommandLog | None = None
        self.gateway: Connection
        self.address = ""
        self.executor: FenceRecorder | None = None
        self.server: MemsvcServer | None = None
        self._granted: dict[int, int] = {}
        self._names = itertools.count()

    def check(self) -> None:
        """Checks every invariant."""
        invariants.check(self.core)

    def check_replay(self) -> None:
        """Checks that the commands taken down so far, written and read again, give the state as it is."""
        if self.log is None:
            return
        entries = [decode_entry(encode_entry(entry)) for part in self.log.segments for entry in part.entries()]
        assert digest(replay(self.log.segments[0].base, entries)) == digest(self.core)

    async def admit(self, tokens: Sequence[int], connection: Connection | None = None, **fields: Any) -> RigSequence:
        """Opens a sequence."""
        gateway = connection if connection is not None else self.gateway
        fields.setdefault("request_id", f"request-{next(self._names)}")
        request = AdmitRequest(
            POOL_ID, fields.pop("epoch", self.epoch), fields.pop("request_id"), 0, pack(tokens), **fields
        )
        try:
            admission = await gateway.admit(request)
        finally:
            self.check()
        return RigSequence(self, gateway, list(tokens), admission)

    async def run(self, tokens: Sequence[int], **fields: Any) -> RigSequence:
        """Opens a sequence, has all its tokens written, and closes it."""
        sequence = await self.admit(tokens, **fields)
        await sequence.write()
        await sequence.close()
        return sequence

    async def grow(self, connection: Connection, count: int) -> list[int]:
        """Leases exactly `count` blocks."""
        if count <= 0:
            return []
        blocks = await self.lease(count, connection)
        assert len(blocks) == count, "the pool is short"
        return blocks

    async def lease(self, count: int, connection: Connection | None = None) -> list[int]:
        """Leases `count` blocks more than ever granted, or as many as there are."""
        gateway = connection if connection is not None else self.gateway
        total = self._granted.get(id(gateway), 0)
        blocks = await gateway.lease(POOL_ID, self.epoch, total + count)
        self._granted[id(gateway)] = total + len(blocks)
        self.check()
        return blocks

    async def journal(self, connection: Connection | None = None, **fields: Any) -> None:
        """Sends a journal."""
        gateway = connection if connection is not None else self.gateway
        entry = JournalEntry(POOL_ID, fields.pop("epoch", self.epoch), **fields)
        try:
            await gateway.journal(entry)
        finally:
            self.check()

    async def merged(self, connection: Connection | None = None) -> list[tuple[int, int, int]]:
        """Returns the blocks that were offered to a gateway since the last call."""
        gateway = connection if connection is not None else self.gateway
        found = [row for event in gateway.events if isinstance(event, BlocksMerged) for row in event.rows]
        gateway.events[:] = [event for event in gateway.events if not isinstance(event, BlocksMerged)]
        return found

    async def pool(self) -> Any:
        """Returns the pool as operators see it."""
        request = admin_pb2.GetPoolRequest(pool_id=POOL_ID)
        pool = (await self.admin.GetPool(request)).pool
        total = (
            pool.used_block_count
            + pool.cached_block_count
            + pool.pending_free_block_count
            + pool.leased_block_count
            + pool.free_block_count
        )
        assert total == pool.spec.block_count - 1
        return pool

    async def block(self, block_id: int) -> Any:
        """Returns a block as operators see it."""
        return await self.admin.GetBlock(admin_pb2.GetBlockRequest(pool_id=POOL_ID, block_id=block_id))

    def free_order(self) -> list[int]:
        """Returns the blocks in the order in which they will be handed out."""
        return self.core.pool(POOL_ID).memory.pool.free_order()

    def state(self) -> tuple[Any, ...]:
        """Returns everything that a refused command must not change."""
        memory = self.core.pool(POOL_ID).memory
        tables = [
            (record.table, tuple(record.blocks), int(memory.tables.tokens[slot]), int(memory.tables.written[slot]))
            for slot in memory.tables.open_slots()
            for record in [memory.tables.record(slot)]
        ]
        pool = memory.pool
        return (
            pool.refs.tolist(),
            pool.state.tolist(),
            pool.generation.tolist(),
            pool.filled.tolist(),
            memory.prefix.published.tolist(),
            pool.free_order(),
            tables,
            {number: (item.granted_total, item.leased, set(item.tables)) for number, item in memory.grants.items()},
            dataclasses.asdict(memory.statistics),
        )


class LocalKeeper:
    """The owner of a core in this process, as far as operators need one."""

    def __init__(self, memory: LocalMemory) -> None:
        self._memory = memory
        self.core = memory.core
        self.log = memory.log
        self.now = 1.0

    def deliver(self) -> None:
        """Commands of operators that have news deliver it themselves here."""

    async def reset_cache(self, pool_id: str, *, force: bool) -> int:
        """Resets the cache of a pool."""
        return self._memory.reset_cache(pool_id, force=force)


class _LocalAdmin:
    """The admin RPCs, called without a network."""

    def __init__(self, keeper: LocalKeeper) -> None:
        self._servicer = AdminServicer(keeper)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._servicer, name)
        return lambda request: method(request, None)


class _RemoteAdmin:
    """The admin RPCs, with the errors that they carry."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = admin_pb2_grpc.AdminServiceStub(channel)

    def __getattr__(self, name: str) -> Any:
        async def call(request: Any) -> Any:
            try:
                return await getattr(self._stub, name)(request, timeout=TIMEOUT)
            except grpc.aio.AioRpcError as error:
                raise status.from_rpc_error(error) from error

        return call


def test_config(**fields: Any) -> MemsvcConfig:
    """Returns settings of a server on a port of the system's choice."""
    return MemsvcConfig(**{"port": 0, "lease_ttl": 30.0, "check_interval": 0.0, **fields})


test_config.__test__ = False  # type: ignore[attr-defined]


@contextlib.asynccontextmanager
async def local_rig(pool: PoolSpec, **core_fields: Any) -> AsyncIterator[Rig]:
    """Yields a rig in this process."""
    core = MemoryCore(b"secret of this test", lease_ttl=float("inf"), **core_fields)
    opened: list[LocalConnection] = []

    def connect(gateway_id: str) -> LocalConnection:
        opened.append(LocalConnection(LocalMemory(core, gateway_id=gateway_id, clock=lambda: 1.0)))
        return opened[-1]

    first = LocalMemory(core, gateway_id="gateway-0", clock=lambda: 1.0, log_bytes=1 << 28)
    rig = Rig("local", core, _LocalAdmin(LocalKeeper(first)), connect)
    assert first.log is not None
    rig.spec, rig.log = pool, first.log
    rig.epoch = first.register_pool(POOL_ID, 7, "127.0.0.1:1", pool)
    opened.append(LocalConnection(first))
    rig.gateway = opened[0]
    await opened[0].start()
    yield rig
    for local in opened:
        await local.close()
    rig.check()
    rig.check_replay()


@contextlib.asynccontextmanager
async def fence_recorder() -> AsyncIterator[tuple[FenceRecorder, str]]:
    """Yields an executor that answers fences, and its address."""
    executor = FenceRecorder()
    server = grpc.aio.server(options=SERVER_OPTIONS)
    execsvc_pb2_grpc.add_ExecutorServiceServicer_to_server(executor, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield executor, f"127.0.0.1:{port}"
    finally:
        executor.allowed.set()
        await server.stop(None)


@contextlib.asynccontextmanager
async def grpc_rig(pool: PoolSpec, config: MemsvcConfig | None = None) -> AsyncIterator[Rig]:
    """Yields a rig behind a server on a loopback port, with an executor that answers fences."""
    async with fence_recorder() as (executor, executor_address):
        server = MemsvcServer(config if config is not None else test_config())
        address = await server.start()
        channel = open_channel(address)
        opened: list[StreamConnection] = []

        def connect(gateway_id: str) -> StreamConnection:
            opened.append(StreamConnection(address, gateway_id))
            return opened[-1]

        rig = Rig("grpc", server.keeper.core, _RemoteAdmin(channel), connect)
        rig.spec, rig.address, rig.executor, rig.server = pool, address, executor, server
        if server.keeper.log is not None:
            rig.log = server.keeper.log
        try:
            registered = await memsvc_pb2_grpc.MemoryServiceStub(channel).RegisterPool(
                memsvc_pb2.RegisterPoolRequest(
                    executor_id=POOL_ID,
                    executor_incarnation=7,
                    address=executor_address,
                    spec=translate.from_spec(pool),
                )
            )
            rig.epoch = registered.epoch
            rig.gateway = connect("gateway-0")
            await opened[0].start()
            yield rig
            for connection in opened:
                await connection.close()
        finally:
            await channel.close()
            await server.stop()
        rig.check()
        rig.check_replay()
