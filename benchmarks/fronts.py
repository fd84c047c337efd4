"""What it costs to stream with one process and with several.

A gateway of one process and one of several stream to 256 clients over 16 connections, with an executor that computes
nothing: at a pace at which no two tokens share a message, and as fast as they go. They alternate, each on services
started anew. Messages are counted at the clients, and so is the processor time of each process. Everything runs on this
machine; the clients take a core themselves, so the rate on the clock says what the machine does, and only the processor
time what the gateway does. Linux only.

    python benchmarks/fronts.py [FRONTS] [ROUNDS]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys

from gateway.bench.front import Front, Window
from gateway.bench.null_stack import NullStack

_RUNNING = 256
_CONNECTIONS = 16
_PACED_STEP_SECONDS = 0.06
_WINDOW_SECONDS = 3.0
_SETTLE_SECONDS = 1.0


async def measure(fronts: int, step_seconds: float) -> Window:
    """Counts once, on services started anew."""
    flags = ("--api-server-count", str(fronts))
    front = Front(_RUNNING, NullStack(_RUNNING, step_seconds, gateway_flags=flags), connections=_CONNECTIONS)
    try:
        await front.start()
        await front.count(_SETTLE_SECONDS)
        return await front.count(_WINDOW_SECONDS)
    finally:
        await front.close()


def summary(windows: list[Window]) -> dict[str, object]:
    """Returns the medians of windows of one kind."""

    def median(values: list[float], digits: int = 1) -> float:
        return round(statistics.median(values), digits)

    def microseconds(share: str) -> float:
        spent = [sum(v for name, v in one.cpu_seconds.items() if name.startswith(share)) for one in windows]
        return median([1e6 * cpu / one.message_count for cpu, one in zip(spent, windows, strict=True)])

    return {
        "messages_per_s": median([one.message_count / one.seconds for one in windows], 0),
        "tokens_per_s": median([one.tokens_per_second for one in windows], 0),
        "tokens_per_message": median([one.token_count / one.message_count for one in windows], 2),
        "gateway_us_a_message": microseconds("gateway"),
        "of_which_engine_us": microseconds("engine"),
        "of_which_fronts_us": microseconds("front-"),
        "clients_us_a_message": microseconds("clients"),
        "busiest_front_share": median(
            [
                max((v for name, v in one.cpu_seconds.items() if name.startswith("front-")), default=0.0) / one.seconds
                for one in windows
            ],
            2,
        ),
        "engine_share": median([one.cpu_seconds.get("engine", 0.0) / one.seconds for one in windows], 2),
    }


async def run(fronts: int, rounds: int) -> dict[str, object]:
    """Measures everything, in alternation."""
    windows: dict[str, list[Window]] = {}
    for _ in range(rounds):
        for pace in (_PACED_STEP_SECONDS, 0.0):
            for count in (1, fronts):
                name = f"{count}_{'paced' if pace else 'unpaced'}"
                windows.setdefault(name, []).append(await measure(count, pace))
                sys.stderr.write(f"{name}\n")
    return {name: summary(found) for name, found in windows.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("fronts", type=int, nargs="?", default=2, metavar="FRONTS", help="processes of the second one")
    parser.add_argument("rounds", type=int, nargs="?", default=3, metavar="ROUNDS", help="windows of each, 3 s long")
    arguments = parser.parse_args()
    print(json.dumps(asyncio.run(run(arguments.fronts, arguments.rounds)), indent=2))
