"""`python -m gateway.bench.serve`: loads an endpoint, and prints one JSON document; progress goes to stderr."""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
import time
from typing import Any

from gateway.bench.serve import plot
from gateway.bench.serve.backends import Backend, OpenAIBackend, QuireBackend
from gateway.bench.serve.load import Counts, Pace, run_load
from gateway.bench.serve.report import build_document, parse_objectives
from gateway.bench.serve.watch import PoolWatch
from gateway.simulate import plot as pictures
from gateway.simulate.workload import Workload, draw, read_trace
from quire.documents import print_document
from quire.errors import ConfigError

_THREADS = 512


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gateway.bench.serve", description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--backend", choices=("quire", "openai"), default="quire")
    parser.add_argument("--model", default="")
    parser.add_argument("--trace", default="")
    parser.add_argument("--replay", action="store_true")
    parser.add_argument("--distribution", default="sharegpt")
    parser.add_argument("--num-prompts", type=int, default=0)
    parser.add_argument("--request-rate", type=float, default=math.inf)
    parser.add_argument("--burstiness", type=float, default=1.0)
    parser.add_argument("--max-concurrency", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--stop-at-eos", action="store_true")
    parser.add_argument("--goodput", nargs="*", default=[])
    parser.add_argument("--memsvc", default="")
    parser.add_argument("--plot", default="")
    return parser


def _workload(options: argparse.Namespace) -> Workload:
    if options.trace:
        workload = read_trace(options.trace)
        return workload.head(options.num_prompts) if options.num_prompts else workload
    return draw(options.distribution, options.num_prompts or 200, options.seed)


def _backend(options: argparse.Namespace) -> Backend:
    ignore_eos = not options.stop_at_eos
    if options.backend == "quire":
        return QuireBackend(options.address, options.model, ignore_eos=ignore_eos)
    threads = options.max_concurrency or _THREADS
    return OpenAIBackend(options.address, options.model, options.vocab_size, threads, ignore_eos=ignore_eos)


def _say(counts: Counts) -> None:
    line = f"progress {counts.done} {counts.total} {counts.running} {counts.failed} {counts.token_count}\n"
    sys.stderr.write(line)
    sys.stderr.flush()


async def _measure(options: argparse.Namespace) -> dict[str, Any]:
    objectives = parse_objectives(options.goodput)
    if options.plot:
        pictures.check(options.plot)
    if options.replay and not options.trace:
        raise ConfigError("--replay: needs a trace, whose times are those of the requests", field="replay")
    workload = _workload(options)
    pace = Pace(options.request_rate, options.burstiness, options.max_concurrency, options.replay, options.seed)
    backend = _backend(options)
    watch = PoolWatch(options.memsvc) if options.memsvc else None
    watching = None
    try:
        await backend.open()
        if watch is not None:
            await watch.look(0.0)
            begun = time.perf_counter()
            watching = asyncio.create_task(watch.run(lambda: time.perf_counter() - begun), name="pool-watch")
        result = await run_load(backend, workload, pace, _say)
    finally:
        if watching is not None:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        if watch is not None:
            await watch.close()
        await backend.close()
    about = {
        "backend": options.backend,
        "address": options.address,
        "model": backend.model,
        "workload": workload.name,
        "request_rate": None if math.isinf(options.request_rate) else options.request_rate,
        "max_concurrency": options.max_concurrency or None,
        "replay": options.replay,
        "objectives_ms": objectives,
    }
    document = build_document(result, watch.samples if watch is not None else [], objectives, about)
    if options.plot:
        plot.draw(document, options.plot)
    return document


def main() -> int:
    """Runs the command. Errors are a document as well: {"error": {reason, message, field}}, exit status 1."""
    options = _parser().parse_args()
    return print_document(lambda: asyncio.run(_measure(options)), "bench")


if __name__ == "__main__":
    sys.exit(main())
