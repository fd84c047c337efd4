"""Ten times more requests than a gateway can serve: what is still served, and how soon the others hear so.

A gateway, memsvc, and an executor without a model run as processes, with a queue of as many requests as run at once.
First a closed loop finds the most that they serve; then requests come at ten times that rate.

    python benchmarks/overload.py [SECONDS]
"""

from __future__ import annotations

import argparse
import asyncio
import json

from gateway.bench.null_stack import NullStack
from gateway.bench.serve.backends import QuireBackend
from gateway.bench.serve.load import Pace, run_load
from gateway.bench.serve.report import build_document
from gateway.simulate.workload import draw

_RUNNING = 32
_LENGTHS = "fixed:64,50"
_FACTOR = 10


async def main(seconds: float) -> None:
    """Runs both loads and prints what came of them."""
    stack = NullStack(_RUNNING, 0.02, gateway_flags=("--max-queue-size", str(_RUNNING)))
    try:
        await stack.start()
        backend = QuireBackend(stack.address, "", ignore_eos=True)
        await backend.open()
        closed = await run_load(backend, draw(_LENGTHS, 8 * _RUNNING, 0), Pace(concurrency=2 * _RUNNING))
        peak = build_document(closed, [], {}, {})
        rate = _FACTOR * peak["request_throughput_per_s"]
        crowd = await run_load(backend, draw(_LENGTHS, int(rate * seconds), 1), Pace(rate=rate))
        flood = build_document(crowd, [], {}, {})
        await backend.close()
    finally:
        await stack.close()
    served = flood["output_throughput_tokens_per_s"] / peak["output_throughput_tokens_per_s"]
    figures = {
        "peak_tokens_per_s": peak["output_throughput_tokens_per_s"],
        "offered_requests_per_s": round(rate, 1),
        "requests": flood["sent"],
        "completed": flood["completed"],
        "failures": flood["failures"],
        "goodput_share_of_peak": round(served, 3),
        "refusal_ms": flood["refusal_ms"],
        "client_lateness_ms": flood["client_lateness_ms"],
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("seconds", type=float, nargs="?", default=10.0, metavar="SECONDS", help="how long they come")
    asyncio.run(main(parser.parse_args().seconds))
