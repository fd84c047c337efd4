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
import secrets
from types import SimpleNamespace
from typing import Any, Protocol

import grpc

from memsvc import translate
from memsvc.admin import AdminServicer
from memsvc.config import MemsvcConfig
from memsvc.core import invariants
from memsvc.core.memory import MemoryCore
from memsvc.local import LocalMemory
from memsvc.server import MemsvcServer
from protos.execsvc.v1 import execsvc_pb2, execsvc_pb2_grpc
from protos.memsvc.v1 import admin_pb2, admin_pb2_grpc, memsvc_pb2, memsvc_pb2_grpc
from quire import columns, errors, status
from quire.memory import (
    Admission,
    AdmitRequest,
    BlocksRecalled,
    CloseReason,
    JournalEntry,
    MemoryEvent,
    PoolSpec,
    PoolUpdated,
)
from quire.rpc import SERVER_OPTIONS, open_channel

POOL_ID = "executor-0"
TIMEOUT = 10.0
_CLASSES = {
    cls.default_reason: cls
    for cls in vars(errors).values()
    if isinstance(cls, type) and issubclass(cls, errors.QuireError)
}


def spec(usable: int = 32, block_size: int = 16, max_model_len: int = 4096) -> PoolSpec:
    """Returns a pool with `usable` blocks that can be granted."""
    return PoolSpec(usable + 1, block_size, 1024, "model", "float32", max_model_len)


def pack(tokens: Sequence[int]) -> bytes:
    """Returns tokens as a column."""
    return columns.pack(list(tokens))


def prompt(length: int, seed: int = 0) -> list[int]:
    """Returns `length` tokens; different seeds have no token in common."""
    return [seed * 1_000_000 + position for position in range(length)]


class Connection(Protocol):
    """One gateway's way to the memory service."""

    events: list[MemoryEvent]

    async def admit(self, request: AdmitRequest) -> Admission:
        """Opens a table."""
        ...

    async def lease(self, pool_id: str, epoch: int, granted_total: int) -> list[int]:
        """Asks for blocks."""
        ...

    async def journal(self, entry: JournalEntry) -> None:
        """Applies a journal."""
        ...

    async def close(self) -> None:
        """Disconnects."""
        ...


class LocalConnection:
    """A gateway in this process."""

    def __init__(self, memory: LocalMemory) -> None:
        self._memory = memory
        self.events: list[MemoryEvent] = []

    async def start(self) -> None:
        """Connects."""
        await self._memory.start(self.events.append)

    async def admit(self, request: AdmitRequest) -> Admission:
        """Opens a table."""
        return await self._memory.admit(request)

    async def lease(self, pool_id: str, epoch: int, granted_total: int) -> list[int]:
        """Asks for blocks."""
        return await self._memory.lease(pool_id, epoch, granted_total)

    async def journal(self, entry: JournalEntry) -> None:
        """Applies a journal."""
        self._memory.journal(entry)

    async def close(self) -> None:
        """Disconnects."""
        await self._memory.close()


class StreamConnection:
    """A gateway on a Connect stream: the smallest client that can be."""

    def __init__(self, address: str, gateway_id: str, incarnation: int = 0) -> None:
        self.gateway_id = gateway_id
        self.incarnation = incarnation or secrets.randbits(63) + 1
        self.events: list[MemoryEvent] = []
        self.responses: asyncio.Queue[memsvc_pb2.ConnectResponse] = asyncio.Queue()
        self._channel = open_channel(address)
        self._numbers = itertools.count(1)
        self._journal_numbers: dict[str, int] = {}
        self.call: Any = None
        self.error: errors.QuireError | None = None
        self._reader: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Says hello and waits for welcome and the pools."""
        self.call = memsvc_pb2_grpc.MemoryServiceStub(self._channel).Connect()
        hello = memsvc_pb2.Hello(gateway_id=self.gateway_id, gateway_incarnation=self.incarnation)
        await self.send(hello=hello)
        first = await asyncio.wait_for(self.call.read(), TIMEOUT)
        assert first is not grpc.aio.EOF, status.from_rpc_error(await self._failure())
        assert first.WhichOneof("message") == "welcome"
        self._reader = asyncio.create_task(self._read())
        await self.ping()

    async def send(self, **message: Any) -> None:
        """Sends one message."""
        await self.call.write(memsvc_pb2.ConnectRequest(**message))

    async def ping(self) -> None:
        """Waits until everything sent before is handled."""
        await self.send(ping=memsvc_pb2.Ping())
        await self.receive("pong")

    async def receive(self, kind: str) -> Any:
        """Returns the next response, which is of `kind`; raises what ended the stream."""
        response = await asyncio.wait_for(self.responses.get(), TIMEOUT)
        found = response.WhichOneof("message")
        if found is None:
            assert self.error is not None, "the stream ended"
            raise self.error
        assert found == kind, f"{found} instead of {kind}: {response}"
        return getattr(response, kind)

    async def _read(self) -> None:
        try:
            while (response := await self.call.read()) is not grpc.aio.EOF:
                kind = response.WhichOneof("message")
                if kind == "pool_update":
                    update = response.pool_update
                    info = SimpleNamespace(pool_id=update.pool_id, epoch=update.epoch, ready=update.state == 1)
                    self.events.append(PoolUpdated(info))  # type: ignore[arg-type]
                elif kind == "recall":
                    recall = response.recall
                    self.events.append(BlocksRecalled(recall.pool_id, recall.epoch, recall.block_count))
                else:
                    self.responses.put_nowait(response)
            if await self.call.code() is not grpc.StatusCode.OK:
                self.error = status.from_rpc_error(await self._failure())
        except grpc.aio.AioRpcError as error:
            self.error = status.from_rpc_error(error)
        except asyncio.CancelledError:
            # The call was cancelled by `abort`; the task itself never is.
            self.error = errors.RequestCancelledError("cancelled here")
        self.responses.put_nowait(memsvc_pb2.ConnectResponse())

    async def _failure(self) -> grpc.aio.AioRpcError:
        return grpc.aio.AioRpcError(
            await self.call.code(),
            await self.call.initial_metadata(),
            await self.call.trailing_metadata(),
            await self.call.details(),
        )

    async def admit(self, request: AdmitRequest) -> Admission:
        """Opens a table; raises what `Refused` says."""
        return await self.answered(next(self._numbers), request)

    async def answered(self, request_no: int, request: AdmitRequest) -> Admission:
        """Admits under a request number of the caller's choice."""
        message = memsvc_pb2.AdmitRequest(request_no=request_no, **dataclasses.asdict(request))
        await self.send(admit=message)
        admitted = await self._answer("admitted", request_no)
        pairs = columns.unpack(admitted.copies, "copies", row_length=2).reshape(-1, 2).tolist()
        blocks = columns.unpack_list(admitted.block_ids, "block_ids")
        return Admission(admitted.epoch, admitted.table, blocks, admitted.cached_token_count, [tuple(p) for p in pairs])

    async def lease(self, pool_id: str, epoch: int, granted_total: int) -> list[int]:
        """Asks for blocks."""
        number = next(self._numbers)
        await self.send(
            lease=memsvc_pb2.LeaseRequest(request_no=number, pool_id=pool_id, epoch=epoch, granted_total=granted_total)
        )
        granted = await self._answer("lease_granted", number)
        return columns.unpack_list(granted.block_ids, "block_ids")

    async def _answer(self, kind: str, request_no: int) -> Any:
        response = await asyncio.wait_for(self.responses.get(), TIMEOUT)
        found = response.WhichOneof("message")
        if found is None:
            assert self.error is not None
            raise self.error
        if found == "refused":
            refused = response.refused
            assert refused.request_no == request_no
            cls = _CLASSES.get(refused.reason, errors.InvalidRequestError if refused.code == 3 else errors.QuireError)
            assert refused.code == cls.code.value[0], refused
            raise cls(refused.message, reason=refused.reason, metadata=dict(refused.metadata))
        assert found == kind, response
        answer = getattr(response, kind)
        assert answer.request_no == request_no
        return answer

    async def journal(self, entry: JournalEntry) -> None:
        """Sends a journal and waits until it is applied."""
        number = self._journal_numbers.get(entry.pool_id, 0) + 1
        self._journal_numbers[entry.pool_id] = number
        await self.send_journal(number, entry)

    async def send_journal(self, number: int, entry: JournalEntry) -> None:
        """Sends a journal under a number of the caller's choice and waits for its acknowledgement."""
        packed = {
            field.name: columns.pack(getattr(entry, field.name))
            for field in dataclasses.fields(entry)
            if field.name not in {"pool_id", "epoch"}
        }
        await self.send(
            journal=memsvc_pb2.Journal(journal_no=number, pool_id=entry.pool_id, epoch=entry.epoch, **packed)
        )
        acknowledged = await self.receive("journal_acknowledged")
        assert acknowledged.journal_no >= number

    async def close(self) -> None:
        """Says goodbye."""
        if self.call is not None:
            with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.UsageError):
                await self.call.done_writing()
        await self._stop()

    async def abort(self) -> None:
        """Breaks the stream."""
        self.call.cancel()
        await self._stop()

    async def _stop(self) -> None:
        if self._reader is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait_for(self._reader, TIMEOUT)
        await self._channel.close()


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
        self.gateway: Connection
        self.address = ""
        self.executor: FenceRecorder | None = None
        self.server: MemsvcServer | None = None
        self._granted: dict[int, int] = {}
        self._names = itertools.count()

    def check(self) -> None:
        """Checks every invariant."""
        invariants.check(self.core)

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


class _LocalAdmin:
    """The admin RPCs, called without a network."""

    def __init__(self, core: MemoryCore) -> None:
        self._servicer = AdminServicer(SimpleNamespace(core=core, now=0.0))  # type: ignore[arg-type]

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

    rig = Rig("local", core, _LocalAdmin(core), connect)
    rig.spec = pool
    first = LocalMemory(core, gateway_id="gateway-0", clock=lambda: 1.0)
    rig.epoch = first.register_pool(POOL_ID, 7, "127.0.0.1:1", pool)
    opened.append(LocalConnection(first))
    rig.gateway = opened[0]
    await opened[0].start()
    yield rig
    for local in opened:
        await local.close()
    rig.check()


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
