"""Measurements of the core alone: blocks, admissions, hashes, bytes. What each figure is, its docstring says."""

from __future__ import annotations

from array import array
import gc
import os
import time
import tracemalloc

import numpy as np

from memsvc.bench.samples import Samples, timed
from memsvc.core.memory import MemoryCore
from memsvc.core.pool import BlockPool, BlockState
from memsvc.core.validation import PoolRegistration
from memsvc.local import LocalMemory, packed
from quire import hashing
from quire.memory import AdmitRequest, CloseReason, JournalEntry, MemoryEvent, PoolSpec

POOL_ID = "bench"
PROMPT_TOKENS = 8192
BLOCKS = 100_000
MAX_MODEL_LEN = 131_072
_TAKEN = 100
_TAKES = 100
_ADMISSIONS = 8
_HASHES = 40
_CACHED_BLOCKS = 40_000
_FILLING = 1000


def pool_spec(block_size: int, block_count: int = BLOCKS) -> PoolSpec:
    """Returns a pool with `block_count` blocks that can be granted."""
    return PoolSpec(block_count + 1, block_size, 1, "model", "float32", MAX_MODEL_LEN)


def take_free() -> Samples:
    """Times taking 100 blocks of a pool of 100,000 at once, and returning them, blank."""
    pool = BlockPool(BLOCKS + 1)
    blank = np.zeros(_TAKEN, bool)
    samples: Samples = {"take_100": [], "free_100": []}
    for _ in range(_TAKES):
        begun = time.perf_counter()
        blocks, _ = pool.take(_TAKEN, 1.0)
        between = time.perf_counter()
        pool.drop(blocks, blank, 1.0)
        samples["free_100"].append(time.perf_counter() - between)
        samples["take_100"].append(between - begun)
    return samples


def hash_tokens(block_size: int) -> Samples:
    """Times hashing the full blocks of 8,192 tokens, one chain."""
    tokens = os.urandom(4 * PROMPT_TOKENS)
    return {"hash_8192": [timed(lambda: hashing.chain(bytes(16), tokens, block_size)) for _ in range(_HASHES)]}


class Admissions:
    """Admissions of prompts of 8,192 tokens through `LocalMemory`, as a gateway in the same process makes them.

    Cold: the prompt was never seen. `admit_8192_cold` begins with the tokens as the gateway keeps them (an array), and
    ends when all blocks are published: the look-up, the blocks, the table (`cold_admit`), then the journal that
    confirms the whole prompt as written, which hashes and publishes (`cold_commit`). A prompt that is computed in
    several chunks needs a journal for each. Cached: the same prompt again, after the first sequence has ended: every
    block but the last is shared, the last one is copied. Closing the table is not part of either, here and at a peer.

    Args:
        block_size: tokens in a block.
    """

    def __init__(self, block_size: int) -> None:
        self._memory = LocalMemory(MemoryCore(bytes(32), lease_ttl=float("inf")))
        self._epoch = self._memory.register_pool(POOL_ID, 1, "h:1", pool_spec(block_size))
        self._count = 0
        self._size = block_size

    async def start(self) -> None:
        """Connects the gateway."""
        await self._memory.start(_ignore)

    async def close(self) -> None:
        """Disconnects it."""
        await self._memory.close()

    async def sample(self) -> Samples:
        """Times a few admissions of either kind."""
        samples: Samples = {name: [] for name in ("admit_8192_cold", "cold_admit", "cold_commit", "admit_8192_cached")}
        for _ in range(_ADMISSIONS):
            tokens = array("I", os.urandom(4 * PROMPT_TOKENS))
            begun = time.perf_counter()
            table, _ = await self._admit(tokens)
            between = time.perf_counter()
            self._memory.journal(
                JournalEntry(POOL_ID, self._epoch, [table], [PROMPT_TOKENS], [0], [PROMPT_TOKENS]),
            )
            ended = time.perf_counter()
            samples["admit_8192_cold"].append(ended - begun)
            samples["cold_admit"].append(between - begun)
            samples["cold_commit"].append(ended - between)
            self._close(table)
            begun = time.perf_counter()
            table, cached = await self._admit(tokens)
            samples["admit_8192_cached"].append(time.perf_counter() - begun)
            assert cached == PROMPT_TOKENS - 1, cached
            self._close(table)
        return samples

    async def _admit(self, tokens: array[int]) -> tuple[int, int]:
        self._count += 1
        request = AdmitRequest(POOL_ID, self._epoch, f"r{self._count}", 0, tokens.tobytes())
        admission = await self._memory.admit(request)
        return admission.table, admission.cached_token_count

    def _close(self, table: int) -> None:
        self._memory.journal(
            JournalEntry(POOL_ID, self._epoch, closed=[table], close_reasons=[CloseReason.FINISHED]),
        )


def cached_bytes(block_size: int) -> Samples:
    """Measures what the core allocates for a pool of 40,000 blocks, all of them cached, by block.

    Everything counts that tracemalloc sees, numpy's columns included: the pool's fixed columns, identities, tokens.
    """
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    core = MemoryCore(bytes(32), lease_ttl=float("inf"))
    core.register_pool(PoolRegistration(POOL_ID, 1, "h:1", pool_spec(block_size, _CACHED_BLOCKS)), 1, 0.0)
    number = core.connect_gateway("filler", 1, 0.0)
    for index in range(_CACHED_BLOCKS // _FILLING):
        count = _FILLING * block_size
        request = AdmitRequest(POOL_ID, 1, f"r{index}", 0, os.urandom(4 * count))
        table = core.admit(number, request, 0.0).table
        entry = JournalEntry(POOL_ID, 1, [table], [count], [0], [count])
        core.journal(number, POOL_ID, 1, packed(entry), 0.0)
        closed = JournalEntry(POOL_ID, 1, closed=[table], close_reasons=[CloseReason.FINISHED])
        core.journal(number, POOL_ID, 1, packed(closed), 0.0)
    gc.collect()
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    cached = core.pool(POOL_ID).memory.pool.count(BlockState.CACHED)
    assert cached == _CACHED_BLOCKS, cached
    return {"bytes_per_cached_block": [used / cached]}


def _ignore(event: MemoryEvent) -> None:
    """Hears what concerns a gateway that has no use for it."""
