"""All measurements of the memory service, round by round, each beside the peer's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
import contextlib
import dataclasses
import os
import platform

import numpy as np

from gateway.bench.bare_stream import BareStream
from gateway.bench.batch import DecodeBatch, SchedulerSteps
from gateway.bench.memsvc_process import MemsvcProcess
from gateway.bench.steady import SteadyRun, count_steady_run
from gateway.clients.memory import RemoteMemory
from memsvc.bench import core
from memsvc.bench.peer import Peer
from memsvc.bench.report import Report, build_report
from memsvc.bench.samples import Samples, merge
from memsvc.core.memory import MemoryCore
from memsvc.local import LocalMemory
from quire.errors import MemoryUnavailableError
from quire.memory import Memory, MemoryEvent, PoolInfo, PoolUpdated

RUNNING = 256
MANY_RUNNING = 4096
_CONNECT_SECONDS = 30.0
_STEADY_RUNNING = RUNNING
_STEADY_BLOCKS = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Measurement:
    """One measurement: how to take a round of samples of ours, and what the peer calls the same."""

    name: str
    sample: Callable[[], Awaitable[Samples]]
    peer: str = ""


async def run(block_size: int, rounds: int, peer: Peer | None, progress: Callable[[str], None]) -> Report:
    """Takes all measurements.

    Args:
        block_size: tokens in a block.
        rounds: times that each is taken; ours and the peer's alternate within a round.
        peer: a started peer, or none.
        progress: hears what is done next.

    Raises:
        QuireError: a service or the peer failed.
    """
    ours: Samples = {}
    theirs: Samples = {}
    async with contextlib.AsyncExitStack() as stack:
        progress("admitting sequences")
        process = MemsvcProcess()
        stack.push_async_callback(process.close)
        await process.start()
        await process.register_pool(core.POOL_ID, core.pool_spec(block_size))
        measurements = await _prepare(stack, block_size, process)
        for number in range(rounds):
            for measurement in measurements:
                progress(f"round {number + 1} of {rounds}: {measurement.name}")
                merge(ours, await measurement.sample())
                if peer is not None and measurement.peer:
                    merge(theirs, await peer.sample(measurement.peer))
        progress("counting what a steady run awaits")
        # Another gateway: what is granted is counted by gateway, and the lane begins at nothing.
        steady = await _steady(*await _remote(stack, process, "steady"))
    progress("filling a pool with cached blocks")
    merge(ours, core.cached_bytes(block_size))
    if peer is not None:
        merge(theirs, await peer.sample("cached_bytes"))
    return build_report(
        ours,
        theirs,
        awaited=steady.awaited_per_step,
        counts=dataclasses.asdict(steady),
        environment=environment(block_size, rounds),
        peer=peer.about if peer is not None else {},
    )


async def _prepare(stack: contextlib.AsyncExitStack, size: int, process: MemsvcProcess) -> list[Measurement]:
    """Returns the measurements, ready to be taken."""
    admissions = core.Admissions(size)
    await admissions.start()
    stack.push_async_callback(admissions.close)
    few = DecodeBatch(*await local_memory(stack, size), RUNNING)
    many = DecodeBatch(*await local_memory(stack, size), MANY_RUNNING, RUNNING)
    whole = SchedulerSteps(*await local_memory(stack, size), RUNNING)
    distant = DecodeBatch(*await _remote(stack, process, "steps"), RUNNING)
    for prepared in (few, many, whole, distant):
        await prepared.start()

    async def step() -> Samples:
        return _named(await few.steps(4 * size), {"step": "step_256", "scan": "scan_256"})

    async def step_of_many() -> Samples:
        # The two are compared, so they alternate.
        taken = _named(await few.steps(size), {"step": "beside_step_256", "scan": "beside_scan_256"})
        merge(taken, _named(await many.steps(size), {"step": "step_4096", "scan": "scan_4096"}))
        return taken

    bare = BareStream(process.address)
    await bare.start(stack)

    async def step_grpc() -> Samples:
        taken = await distant.steps(4 * size, acknowledged=True)
        taken = _named(taken, {"step": "step_256_grpc", "handed_over": "occupied_256_grpc"})
        merge(taken, await bare.sample(4 * size))
        return taken

    async def take_free() -> Samples:
        return core.take_free()

    async def hash_tokens() -> Samples:
        return core.hash_tokens(size)

    return [
        Measurement("decode steps", step, "step"),
        Measurement("decode steps of 4,096 sequences", step_of_many),
        Measurement("decode steps of the whole scheduler", lambda: whole.steps(4 * size)),
        Measurement("decode steps over gRPC", step_grpc),
        Measurement("admissions", admissions.sample, "admit"),
        Measurement("taking and freeing blocks", take_free, "take_free"),
        Measurement("hashing", hash_tokens, "hash"),
    ]


async def local_memory(stack: contextlib.AsyncExitStack, block_size: int) -> tuple[Memory, PoolInfo]:
    """Returns a memory in this process with one pool."""
    memory = LocalMemory(MemoryCore(bytes(32), lease_ttl=float("inf")), gateway_id="bench")
    memory.register_pool(core.POOL_ID, 1, "127.0.0.1:1", core.pool_spec(block_size))
    return memory, await _connect(stack, memory)


async def _remote(stack: contextlib.AsyncExitStack, process: MemsvcProcess, name: str) -> tuple[Memory, PoolInfo]:
    """Returns the memory of a process as the gateway `name` uses it, and its pool."""
    memory = RemoteMemory(process.address, name)
    return memory, await _connect(stack, memory)


async def _connect(stack: contextlib.AsyncExitStack, memory: Memory) -> PoolInfo:
    """Starts a memory and returns its pool."""
    pools: asyncio.Queue[PoolInfo] = asyncio.Queue()

    def listen(event: MemoryEvent) -> None:
        if isinstance(event, PoolUpdated):
            pools.put_nowait(event.pool)

    await memory.start(listen)
    stack.push_async_callback(memory.close)
    try:
        return await asyncio.wait_for(pools.get(), _CONNECT_SECONDS)
    except TimeoutError:
        raise MemoryUnavailableError(f"no pool was announced within {_CONNECT_SECONDS:g} s") from None


async def _steady(memory: Memory, pool: PoolInfo) -> SteadyRun:
    return await count_steady_run(memory, pool, _STEADY_RUNNING, _STEADY_BLOCKS * pool.spec.block_size)


def _named(samples: Samples, names: dict[str, str]) -> Samples:
    """Returns some of `samples` under other names."""
    return {new: samples[old] for old, new in names.items()}


def environment(block_size: int, rounds: int) -> dict[str, object]:
    """Returns the machine and the versions, for a report."""
    return {
        "block_size": block_size,
        "rounds": rounds,
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
