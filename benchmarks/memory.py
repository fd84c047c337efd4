"""Times the memory service: `python benchmarks/memory.py [--json]`. Medians in microseconds, block size 16.

A decode step is 256 sequences that advance by one token each, 16 of which append a block and commit one. In process it
is the call that the gateway makes; over gRPC the time from sending the journal to its acknowledgement, for which the
gateway does not wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
import json
import os
import statistics
import sys
import time
import tracemalloc

import numpy as np

from gateway.clients.memory import journal_message
from memsvc.config import MemsvcConfig
from memsvc.core.memory import MemoryCore, PoolRegistration
from memsvc.core.pool import BlockPool
from memsvc.local import columns_of
from memsvc.server import MemsvcServer
from memsvc.translate import from_spec
from protos.memsvc.v1 import memsvc_pb2, memsvc_pb2_grpc
from quire import hashing
from quire.logging import configure_logging
from quire.memory import AdmitRequest, CloseReason, JournalEntry, PoolSpec
from quire.rpc import open_channel

POOL = "pool"
PROMPT_TOKENS = 8192
SPEC = PoolSpec(120_000, 16, 1, "model", "float32", 131_072)


def median_us(samples: list[float]) -> float:
    """Returns the median of seconds in microseconds."""
    return round(statistics.median(samples) * 1e6, 1)


def timed(call: Callable[[], object]) -> float:
    """Returns the seconds that `call` takes."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def new_core() -> tuple[MemoryCore, int]:
    """Returns a core with one pool, and the number of a gateway."""
    core = MemoryCore(bytes(32), lease_ttl=float("inf"))
    core.register_pool(PoolRegistration(POOL, 1, "h:1", SPEC), 1, 0.0)
    return core, core.connect_gateway("gateway", 1, 0.0)


def take_and_free() -> dict[str, float]:
    """Times taking and freeing 100 blocks."""
    pool = BlockPool(20_000)
    blank = np.zeros(100, bool)
    taking, freeing = [], []
    for _ in range(500):
        begun = time.perf_counter()
        blocks, _ = pool.take(100, 1.0)
        between = time.perf_counter()
        pool.drop(blocks, blank, 1.0)
        taking.append(between - begun)
        freeing.append(time.perf_counter() - between)
    return {"take_100_us": median_us(taking), "free_100_us": median_us(freeing)}


def admissions() -> dict[str, float]:
    """Times admissions of long prompts that the pool has never seen, and of the same ones again."""
    core, gateway = new_core()
    cold, cached, committing = [], [], []
    for index in range(100):
        request = AdmitRequest(POOL, 1, f"r{index}", 0, os.urandom(4 * PROMPT_TOKENS))
        cold.append(timed(lambda request=request: core.admit(gateway, request, 1.0)))  # type: ignore[misc]
        table = core.pool(POOL).memory.tables.next_counter - 1
        written = JournalEntry(
            POOL,
            1,
            [table],
            [PROMPT_TOKENS],
            [0],
            [PROMPT_TOKENS],
            closed=[table],
            close_reasons=[CloseReason.FINISHED],
        )
        committing.append(timed(lambda entry=written: core.journal(gateway, POOL, 1, columns_of(entry), 1.0)))  # type: ignore[misc]
        cached.append(timed(lambda request=request: core.admit(gateway, request, 1.0)))  # type: ignore[misc]
        table = core.pool(POOL).memory.tables.next_counter - 1
        closed = JournalEntry(POOL, 1, closed=[table], close_reasons=[CloseReason.CANCELLED])
        core.journal(gateway, POOL, 1, columns_of(closed), 1.0)
    return {
        "admit_8192_cold_us": median_us(cold),
        "admit_8192_cached_us": median_us(cached),
        "write_and_close_8192_us": median_us(committing),
    }


class Decoding:
    """Sequences that decode: builds the journal of each step.

    Args:
        tables: their tables.
        lengths: their tokens.
        grow: returns leased blocks.
    """

    def __init__(self, tables: list[int], lengths: list[int], grow: Callable[[int], list[int]]) -> None:
        self._tables = tables
        self._lengths = lengths
        self._leased = grow(len(tables) * 16)

    def step(self, advancing: int) -> JournalEntry:
        """Returns the journal of a step in which the first `advancing` sequences decode."""
        entry = JournalEntry(POOL, 1)
        for index in range(advancing):
            length = self._lengths[index]
            entry.tables.append(self._tables[index])
            entry.token_starts.append(length)
            entry.token_counts.append(1)
            entry.token_ids.append(length % 1000 + index)
            entry.written_counts.append(length)
            if length % 16 == 0:
                entry.appended += [self._tables[index], length // 16, self._leased.pop()]
            self._lengths[index] = length + 1
        return entry


def decode_steps(running: int) -> float:
    """Times the steps of 256 sequences out of `running`."""
    core, gateway = new_core()
    lengths = [65 + index % 16 for index in range(running)]
    tables = [
        core.admit(gateway, AdmitRequest(POOL, 1, f"r{i}", 0, os.urandom(4 * length), skip_cache_read=True), 1.0).table
        for i, length in enumerate(lengths)
    ]
    decoding = Decoding(tables, lengths, lambda count: core.lease(gateway, POOL, 1, count, 1.0))
    samples = []
    for _ in range(200):
        entry = decoding.step(256)
        samples.append(timed(lambda entry=entry: core.journal(gateway, POOL, 1, columns_of(entry), 1.0)))  # type: ignore[misc]
    return median_us(samples)


async def decode_steps_grpc() -> float:
    """Times the same steps over a stream, each until it is acknowledged."""
    configure_logging("error", service="benchmark")
    server = MemsvcServer(MemsvcConfig(port=0, lease_ttl=600.0, check_interval=0.0))
    async with open_channel(await server.start()) as channel:
        stub = memsvc_pb2_grpc.MemoryServiceStub(channel)
        await stub.RegisterPool(
            memsvc_pb2.RegisterPoolRequest(
                executor_id=POOL, executor_incarnation=1, address="h:1", spec=from_spec(SPEC)
            )
        )
        core = server.keeper.core
        stream = stub.Connect()
        hello = memsvc_pb2.Hello(gateway_id="gateway", gateway_incarnation=1)
        await stream.write(memsvc_pb2.ConnectRequest(hello=hello))
        for _ in range(2):
            await stream.read()
        lengths = [65 + index % 16 for index in range(256)]
        tables = [
            core.admit(1, AdmitRequest(POOL, 1, f"r{i}", 0, os.urandom(4 * length), skip_cache_read=True), 1.0).table
            for i, length in enumerate(lengths)
        ]
        decoding = Decoding(tables, lengths, lambda count: core.lease(1, POOL, 1, count, 1.0))
        samples = []
        for number in range(1, 201):
            entry = decoding.step(256)
            begun = time.perf_counter()
            message = memsvc_pb2.ConnectRequest(journal=journal_message(entry, number))
            await stream.write(message)
            response = await stream.read()
            samples.append(time.perf_counter() - begun)
            assert response.journal_acknowledged.journal_no == number, response
        await stream.done_writing()
    await server.stop()
    return median_us(samples)


def bytes_per_cached_block() -> float:
    """Returns the memory of a pool that is full of cached blocks, by block."""
    tracemalloc.start()
    core = MemoryCore(bytes(32), lease_ttl=float("inf"))
    spec = PoolSpec(40_001, 16, 1, "model", "float32", 131_072)
    before = tracemalloc.get_traced_memory()[0]
    core.register_pool(PoolRegistration(POOL, 1, "h:1", spec), 1, 0.0)
    gateway = core.connect_gateway("gateway", 1, 0.0)
    for _ in range(39):
        table = core.admit(gateway, AdmitRequest(POOL, 1, "r", 0, os.urandom(4 * 16 * 1024)), 1.0).table
        entry = JournalEntry(
            POOL, 1, [table], [16_384], [0], [16_384], closed=[table], close_reasons=[CloseReason.FINISHED]
        )
        core.journal(gateway, POOL, 1, columns_of(entry), 1.0)
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return round(used / spec.block_count, 1)


def hashing_rate() -> float:
    """Returns how many million tokens a second are hashed."""
    tokens = os.urandom(4 * PROMPT_TOKENS)
    seconds = statistics.median(timed(lambda: hashing.chain(bytes(16), tokens, 16)) for _ in range(200))
    return round(PROMPT_TOKENS / seconds / 1e6, 1)


def measure() -> Iterator[tuple[str, float]]:
    """Yields each figure as it is known."""
    yield from take_and_free().items()
    yield from admissions().items()
    yield "step_256_decodes_inprocess_us", decode_steps(256)
    yield "step_256_of_4096_decodes_inprocess_us", decode_steps(4096)
    yield "step_256_decodes_grpc_us", asyncio.run(decode_steps_grpc())
    yield "hash_mtok_per_s", hashing_rate()
    yield "bytes_per_cached_block", bytes_per_cached_block()


def main() -> None:
    """Runs the command."""
    figures = {}
    for name, value in measure():
        figures[name] = value
        if "--json" not in sys.argv:
            print(f"{name:40} {value:10.1f}", flush=True)
    if "--json" in sys.argv:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
