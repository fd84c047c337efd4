"""The memory service behind gRPC: one stream, kept open, opened again under a new incarnation when it breaks."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

import grpc
import structlog

from protos.memsvc.v1 import memsvc_pb2 as pb
from protos.memsvc.v1 import memsvc_pb2_grpc
from quire import columns, errors, status
from quire.errors import MemoryUnavailableError, QuireError
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
    MemoryLost,
    PoolInfo,
    PoolSpec,
    PoolUpdated,
)
from quire.rpc import open_channel

log = structlog.get_logger(__name__)

_OUTBOX_SIZE = 4_096
_ANSWER_SECONDS = 10.0
_HEARTBEAT_SECONDS = 0.25
_RECONNECT_SECONDS = (0.1, 0.2, 0.5, 1.0)

_ERRORS = {
    cls.default_reason: cls
    for cls in (
        errors.BlockPoolExhaustedError,
        errors.PromptTooLongError,
        errors.PoolNotFoundError,
        errors.StaleEpochError,
        errors.TenantCeilingError,
        errors.InvalidRequestError,
        errors.SequenceNotFoundError,
        errors.PrefixPendingError,
        errors.NotReadyError,
    )
}


def pool_info(update: pb.PoolUpdate) -> PoolInfo:
    """Returns a pool as the gateway keeps it."""
    spec = update.spec
    return PoolInfo(
        pool_id=update.pool_id,
        epoch=update.epoch,
        ready=update.state == pb.POOL_STATE_READY,
        spec=PoolSpec(
            block_count=spec.block_count,
            block_size=spec.block_size,
            bytes_per_block=spec.bytes_per_block,
            model_id=spec.model_id,
            kv_dtype=spec.kv_dtype,
            max_model_len=spec.max_model_len,
            sliding_window=spec.sliding_window,
        ),
        executor_address=update.executor_address,
        executor_incarnation=update.executor_incarnation,
    )


def journal_message(entry: JournalEntry, journal_no: int) -> pb.Journal:
    """Returns an entry as it travels."""
    return pb.Journal(
        journal_no=journal_no,
        pool_id=entry.pool_id,
        epoch=entry.epoch,
        tables=columns.pack(entry.tables),
        token_starts=columns.pack(entry.token_starts),
        token_counts=columns.pack(entry.token_counts),
        token_ids=columns.pack(entry.token_ids),
        written_counts=columns.pack(entry.written_counts),
        appended=columns.pack(entry.appended),
        closed=columns.pack(entry.closed),
        close_reasons=columns.pack(entry.close_reasons),
        returned=columns.pack(entry.returned),
        replaced=columns.pack(entry.replaced),
    )


_Answer = pb.Admitted | pb.Forked | pb.LeaseGranted


class _Connection:
    """One life of the stream: an incarnation, an outbox, and the answers that are awaited."""

    def __init__(self, gateway_id: str) -> None:
        self.incarnation = secrets.randbits(63) + 1
        self.outbox: asyncio.Queue[pb.ConnectRequest] = asyncio.Queue(_OUTBOX_SIZE)
        self.answers: dict[int, asyncio.Future[Any]] = {}
        self.journal_nos: dict[str, int] = {}
        self.acknowledged: dict[str, int] = {}
        self.acknowledgement = asyncio.Event()
        self.written_count = 0
        self.failure: str = ""
        hello = pb.Hello(gateway_id=gateway_id, gateway_incarnation=self.incarnation)
        self.outbox.put_nowait(pb.ConnectRequest(hello=hello))


class RemoteMemory:
    """`quire.memory.Memory` over `quire.memsvc.v1.MemoryService.Connect`.

    When the stream breaks, everything granted under it is void: memsvc fences and frees the old incarnation, and the
    gateway admits its sequences again under a new one. Tokens are the truth, keys and values a cache of them.
    """

    def __init__(self, address: str, gateway_id: str) -> None:
        """Prepares a channel to host:port."""
        self._address = address
        self._gateway_id = gateway_id
        self._channel = open_channel(address)
        self._stub = memsvc_pb2_grpc.MemoryServiceStub(self._channel)
        self._connection: _Connection | None = None
        self._listener: MemoryListener | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._request_no = 0

    @property
    def gateway_incarnation(self) -> int:
        """See Memory."""
        if self._connection is None:
            raise MemoryUnavailableError(f"not connected to memsvc at {self._address}")
        return self._connection.incarnation

    async def start(self, listener: MemoryListener) -> None:
        """See Memory."""
        self._listener = listener
        self._keeper = asyncio.create_task(self._keep_connected(), name="memsvc-connection")

    async def close(self) -> None:
        """See Memory. Journals that wait are sent first, for as long as a moment allows."""
        connection = self._connection
        if connection is not None and not connection.failure:
            try:
                await asyncio.wait_for(connection.outbox.join(), 1.0)
            except TimeoutError:
                log.warning("journal_unsent", message_count=connection.outbox.qsize())
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        await self._channel.close()

    async def admit(self, request: AdmitRequest) -> Admission:
        """See Memory."""
        message = pb.AdmitRequest(
            pool_id=request.pool_id,
            epoch=request.epoch,
            request_id=request.request_id,
            sample_index=request.sample_index,
            token_ids=request.token_ids,
            tenant=request.tenant,
            cache_salt=request.cache_salt,
            adapter=request.adapter,
            skip_cache_read=request.skip_cache_read,
            skip_cache_write=request.skip_cache_write,
            max_new_tokens=request.max_new_tokens,
            min_new_tokens=request.min_new_tokens,
            resumed=request.resumed,
            wait_for_prefix=request.wait_for_prefix,
            media=[
                pb.MediaItem(start=item.start, token_count=item.token_count, digest=item.digest)
                for item in request.media
            ],
            session_id=request.session_id,
            retention_priority=request.retention_priority,
            retention_ttl_seconds=request.retention_ttl_seconds,
            swapped_token_count=request.swapped_token_count,
        )
        self._request_no += 1
        message.request_no = self._request_no
        answer: pb.Admitted = await self._ask(pb.ConnectRequest(admit=message), self._request_no)
        copies = columns.unpack_list(answer.copies, "copies", row_length=2)
        return Admission(
            epoch=answer.epoch,
            table=answer.table,
            block_ids=columns.unpack_list(answer.block_ids, "block_ids"),
            cached_token_count=answer.cached_token_count,
            copies=list(zip(copies[::2], copies[1::2], strict=True)),
            pending_token_count=answer.pending_token_count,
        )

    async def fork(self, request: ForkRequest) -> Fork:
        """See Memory."""
        self._request_no += 1
        message = pb.ForkRequest(
            request_no=self._request_no,
            pool_id=request.pool_id,
            epoch=request.epoch,
            table=request.table,
            count=request.count,
            at_token=request.at_token,
            first_sample_index=request.first_sample_index,
        )
        answer: pb.Forked = await self._ask(pb.ConnectRequest(fork=message), self._request_no)
        return Fork(
            epoch=answer.epoch,
            tables=columns.unpack_list(answer.tables, "tables"),
            block_ids=columns.unpack_list(answer.block_ids, "block_ids"),
            token_count=answer.token_count,
            must_copy=answer.must_copy,
        )

    async def lease(self, pool_id: str, epoch: int, granted_total: int) -> list[int]:
        """See Memory."""
        self._request_no += 1
        message = pb.LeaseRequest(
            request_no=self._request_no, pool_id=pool_id, epoch=epoch, granted_total=granted_total
        )
        answer: pb.LeaseGranted = await self._ask(pb.ConnectRequest(lease=message), self._request_no)
        return columns.unpack_list(answer.block_ids, "block_ids")

    def journal(self, entry: JournalEntry) -> None:
        """See Memory. If memsvc does not keep up the connection is given up: nothing is dropped silently."""
        connection = self._connection
        if connection is None or connection.failure:
            return  # What it would say is void: the tables died with their connection.
        number = connection.journal_nos.get(entry.pool_id, 0) + 1
        connection.journal_nos[entry.pool_id] = number
        self._send(connection, pb.ConnectRequest(journal=journal_message(entry, number)))

    async def flush(self) -> None:
        """See Memory."""
        connection = self._connection
        if connection is None:
            return  # Nothing that was journalled is still held: it died with its connection.
        wanted = dict(connection.journal_nos)
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                while any(connection.acknowledged.get(pool, 0) < number for pool, number in wanted.items()):
                    if self._connection is not connection:
                        return
                    connection.acknowledgement.clear()
                    await connection.acknowledgement.wait()
        except TimeoutError:
            raise MemoryUnavailableError("memsvc does not acknowledge journals") from None

    def _send(self, connection: _Connection, message: pb.ConnectRequest) -> None:
        """Puts a message into the outbox; raises MemoryUnavailableError when that is full."""
        try:
            connection.outbox.put_nowait(message)
        except asyncio.QueueFull:
            connection.failure = f"memsvc does not keep up: {_OUTBOX_SIZE} messages wait"
            raise MemoryUnavailableError(connection.failure) from None

    async def _ask(self, message: pb.ConnectRequest, request_no: int) -> Any:
        """Sends a request and waits for its answer."""
        connection = self._connection
        if connection is None or connection.failure:
            raise MemoryUnavailableError(f"not connected to memsvc at {self._address}")
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        connection.answers[request_no] = answer
        try:
            self._send(connection, message)
            return await asyncio.wait_for(answer, _ANSWER_SECONDS)
        except TimeoutError:
            connection.failure = f"memsvc at {self._address} did not answer within {_ANSWER_SECONDS:g} s"
            raise MemoryUnavailableError(connection.failure) from None
        finally:
            connection.answers.pop(request_no, None)

    async def _keep_connected(self) -> None:
        """Opens the stream, again and again."""
        attempt = 0
        while True:
            connection = _Connection(self._gateway_id)
            reason = await self._live(connection)
            was_connected, self._connection = self._connection is connection, None
            connection.acknowledgement.set()
            for answer in connection.answers.values():
                if not answer.done():
                    answer.set_exception(MemoryUnavailableError(f"the connection to memsvc is lost: {reason}"))
            if was_connected:
                attempt = 0
                log.warning("memory_lost", address=self._address, reason=reason)
                self._notify(MemoryLost(reason))
            elif attempt == 0:
                log.warning(
                    "memory_unreachable", address=self._address, reason=reason, advice="is memsvc running there?"
                )
            await asyncio.sleep(_RECONNECT_SECONDS[min(attempt, len(_RECONNECT_SECONDS) - 1)])
            attempt += 1

    def _notify(self, event: MemoryEvent) -> None:
        assert self._listener is not None
        self._listener(event)

    async def _live(self, connection: _Connection) -> str:
        """Runs one connection until it breaks; returns why."""
        call = self._stub.Connect()
        tasks = [
            # When several ended, the reader knows the server's reason.
            asyncio.create_task(self._read(connection, call), name="memsvc-reader"),
            asyncio.create_task(self._write(connection, call), name="memsvc-writer"),
            asyncio.create_task(self._heartbeat(connection), name="memsvc-heartbeat"),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return next(task for task in tasks if task in done).result()
        finally:
            call.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _write(self, connection: _Connection, call: Any) -> str:
        """Sends the outbox."""
        while not connection.failure:
            message = await connection.outbox.get()
            try:
                await call.write(message)
                connection.written_count += 1
                connection.outbox.task_done()
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
                # The reader learns the status; give it the time to.
                await asyncio.sleep(1.0)
                return f"cannot write: {error}"
        return connection.failure

    @staticmethod
    async def _heartbeat(connection: _Connection) -> str:
        """Has a ping sent when nothing was sent for an interval or two; a timer for each message is too dear."""
        while not connection.failure:
            written_count = connection.written_count
            await asyncio.sleep(_HEARTBEAT_SECONDS)
            if connection.written_count == written_count and connection.outbox.empty():
                connection.outbox.put_nowait(pb.ConnectRequest(ping=pb.Ping()))
        return connection.failure

    async def _read(self, connection: _Connection, call: Any) -> str:
        """Handles what memsvc says until the stream ends; returns why it ended."""
        try:
            async for response in call:
                self._handle(connection, response)
        except grpc.aio.AioRpcError as error:
            return status.from_rpc_error(error).message
        return "memsvc closed the stream"

    def _handle(self, connection: _Connection, response: pb.ConnectResponse) -> None:
        """Handles one message."""
        kind = response.WhichOneof("message")
        if kind == "admitted":
            self._answer(connection, response.admitted.request_no, response.admitted)
        elif kind == "lease_granted":
            self._answer(connection, response.lease_granted.request_no, response.lease_granted)
        elif kind == "forked":
            self._answer(connection, response.forked.request_no, response.forked)
        elif kind == "refused":
            refusal = response.refused
            cls = _ERRORS.get(refusal.reason, QuireError)
            error = cls(refusal.message, reason=refusal.reason, metadata=dict(refusal.metadata))
            self._answer(connection, refusal.request_no, error)
        elif kind == "journal_acknowledged":
            connection.acknowledged[response.journal_acknowledged.pool_id] = response.journal_acknowledged.journal_no
            connection.acknowledgement.set()
        elif kind == "pool_update":
            self._notify(PoolUpdated(pool_info(response.pool_update)))
        elif kind == "recall":
            recall = response.recall
            self._notify(BlocksRecalled(recall.pool_id, recall.epoch, recall.block_count))
        elif kind == "merge":
            merge = response.merge
            values = iter(columns.unpack_list(merge.rows, "rows", row_length=3))
            self._notify(BlocksMerged(merge.pool_id, merge.epoch, list(zip(values, values, values, strict=True))))
        elif kind == "welcome":
            self._connection = connection
            log.info("memory_connected", address=self._address, memsvc_incarnation=response.welcome.memsvc_incarnation)

    @staticmethod
    def _answer(connection: _Connection, request_no: int, value: _Answer | QuireError) -> None:
        """Wakes who asked; nobody does any more if the wait was given up."""
        answer = connection.answers.get(request_no)
        if answer is None or answer.done():
            return
        if isinstance(value, QuireError):
            answer.set_exception(value)
        else:
            answer.set_result(value)
