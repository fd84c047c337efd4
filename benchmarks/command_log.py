"""Measures the command log: what it adds to a command, copies of the state, bytes, and replays.

    python benchmarks/command_log.py [--blocks 20000 100000] [--tables 256] [--json]

All cores are in this process; with and without a log they take the same commands in turn.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
import json
from pathlib import Path
import statistics
import sys
import time

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from memsvc.core import snapshot
from memsvc.core.journal import PackedJournal
from memsvc.core.log import CommandLog
from memsvc.core.memory import MemoryCore
from memsvc.core.replay import replay_segments
from memsvc.core.validation import PoolRegistration
from memsvc.local import packed
from quire.columns import pack
from quire.memory import AdmitRequest, JournalEntry, PoolSpec

POOL = "pool"
PROMPT = 300
STEPS = 400
LOG_BYTES = 1 << 30


def new_core(blocks: int, tables: int) -> tuple[MemoryCore, list[int]]:
    """Returns a core with `tables` open tables, and their counters."""
    core = MemoryCore(bytes(32), lease_ttl=float("inf"))
    spec = PoolSpec(blocks, 16, 1, "model", "bfloat16", 8192)
    core.register_pool(PoolRegistration(POOL, 1, "host:1", spec), 1, 0.0)
    core.connect_gateway("gateway", 1, 0.0)
    opened = []
    for number in range(tables):
        tokens = pack(list(range(number * 1000, number * 1000 + PROMPT)))
        opened.append(core.admit(1, AdmitRequest(POOL, 1, f"r{number}", 0, tokens), 1.0).table)
    count = len(opened)
    core.journal(1, POOL, 1, journal(opened, PROMPT, 0, PROMPT - 1), 1.0)
    assert count == tables
    return core, opened


def journal(tables: list[int], start: int, count: int, written: int) -> PackedJournal:
    """Returns a journal of one row a table."""
    rows = len(tables)
    return packed(JournalEntry(POOL, 1, tables, [start] * rows, [count] * rows, [written] * rows, [7] * (rows * count)))


def microseconds(call: Callable[[], object]) -> float:
    """Returns how long a call takes."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


def commands(blocks: int, tables: int) -> dict[str, float]:
    """Returns what a log adds to a journal that confirms a token of every table, and to a heartbeat."""
    plain, opened = new_core(blocks, tables)
    logged, _ = new_core(blocks, tables)
    log = CommandLog(logged, LOG_BYTES)
    rows = journal(opened, PROMPT, 0, PROMPT - 1)
    samples: tuple[list[float], list[float]] = ([], [])
    beats: tuple[list[float], list[float]] = ([], [])
    for step in range(STEPS):
        for core, spent, beat in ((plain, samples[0], beats[0]), (logged, samples[1], beats[1])):
            spent.append(microseconds(lambda core=core, step=step: core.journal(1, POOL, 1, rows, 2.0 + step)))
            beat.append(microseconds(lambda core=core: [core.touch_gateway(1, 9.0) for _ in range(100)]) / 100)
    count = log.end
    replayed = microseconds(lambda: replay_segments(log.segments))
    # What is counted now and then is spread over the commands between.
    append = [
        microseconds(lambda: [log.append("journal", (1, POOL, 1, rows, 3.0), {}, refused=False) for _ in range(640)])
        for _ in range(25)
    ]
    return {
        "journal_us": statistics.median(samples[0]),
        "journal_logged_us": statistics.median(samples[1]),
        "journal_entry_us": statistics.median(append) / 640,
        "touch_us": statistics.median(beats[0]),
        "touch_logged_us": statistics.median(beats[1]),
        "replay_us_a_command": replayed / count,
    }


def snapshots(blocks: int, tables: int) -> dict[str, float]:
    """Returns what a copy of the state costs, in fresh memory and in a spare copy's, and its bytes."""
    core, _ = new_core(blocks, tables)
    spare = snapshot.clone(core)
    fresh = [microseconds(lambda: snapshot.clone(core)) for _ in range(9)]
    reused = [microseconds(lambda: snapshot.clone(core, spare)) for _ in range(25)]
    data = snapshot.encode(core)
    return {
        "fresh_copy_ms": statistics.median(fresh) / 1e3,
        "copy_ms": statistics.median(reused) / 1e3,
        "copy_least_ms": min(reused) / 1e3,
        "digest_ms": microseconds(lambda: snapshot.digest(core)) / 1e3,
        "bytes_a_block": len(data) / blocks,
    }


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, nargs="+", default=[20_000, 100_000])
    parser.add_argument("--tables", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    figures = {"commands": commands(options.blocks[0], options.tables)}
    figures |= {f"{blocks} blocks": snapshots(blocks, options.tables) for blocks in options.blocks}
    if options.json:
        print(json.dumps(figures, indent=2))
        return
    for part, values in figures.items():
        print(part)
        for name, value in values.items():
            print(f"  {name:24}{value:12.2f}")


if __name__ == "__main__":
    main()
