"""Two ways to use the memory service: in this process, and behind a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
import contextlib
import dataclasses
import itertools
import secrets
from types import SimpleNamespace
from typing import Any, Protocol

import grpc

from memsvc.local import LocalMemory
from protos.memsvc.v1 import memsvc_pb2, memsvc_pb2_grpc
from quire import columns, errors, status
from quire.memory import (
    Admission,
    AdmitRequest,
    BlocksMerged,
    BlocksRecalled,
    Fork,
    ForkRequest,
    JournalEntry,
    MemoryEvent,
    PoolSpec,
    PoolUpdated,
)
from quire.rpc import open_channel

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

    async def fork(self, request: ForkRequest) -> Fork:
        """Opens tables that share the beginning of another."""
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

    async def fork(self, request: ForkRequest) -> Fork:
        """Opens tables that share the beginning of another."""
        return await self._memory.fork(request)

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
                elif kind == "merge":
                    rows = columns.unpack(response.merge.rows, "rows", row_length=3).reshape(-1, 3).tolist()
                    merged = BlocksMerged(response.merge.pool_id, response.merge.epoch, [tuple(row) for row in rows])
                    self.events.append(merged)
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
        copies = [(source, target) for source, target in pairs]
        cached, pending = admitted.cached_token_count, admitted.pending_token_count
        return Admission(admitted.epoch, admitted.table, blocks, cached, copies, pending)

    async def fork(self, request: ForkRequest) -> Fork:
        """Opens tables that share the beginning of another; raises what `Refused` says."""
        number = next(self._numbers)
        await self.send(fork=memsvc_pb2.ForkRequest(request_no=number, **dataclasses.asdict(request)))
        forked = await self._answer("forked", number)
        tables = columns.unpack_list(forked.tables, "tables")
        blocks = columns.unpack_list(forked.block_ids, "block_ids")
        return Fork(forked.epoch, tables, blocks, forked.token_count, must_copy=forked.must_copy)

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
