"""`python -m gateway.simulate`: replays a workload under each policy, and prints one JSON document.

Progress goes to stderr, a line of "policy done total" now and then.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
import sys
from typing import Any, Final

from gateway.simulate import plot
from gateway.simulate.run import Limits, Simulation
from gateway.simulate.workload import Workload, draw, read_trace
from memsvc.policies import contiguous
from memsvc.policies.interface import Policy
from memsvc.policies.paged import Paged
from quire.documents import print_document
from quire.errors import ConfigError
from quire.memory import PoolSpec

_PROGRESS_PARTS: Final = 200

POLICIES: Final[dict[str, Callable[[PoolSpec], Policy]]] = {
    "paged": Paged,
    "reserve": lambda spec: contiguous.reserve(contiguous.reserving_pool(spec)),
    "contiguous-oracle": lambda spec: contiguous.contiguous_oracle(contiguous.reserving_pool(spec)),
    "contiguous-pow2": lambda spec: contiguous.contiguous_pow2(contiguous.reserving_pool(spec)),
    "contiguous": lambda spec: contiguous.contiguous(contiguous.reserving_pool(spec)),
}


def _workload(options: argparse.Namespace) -> Workload:
    if options.trace:
        workload = read_trace(options.trace)
        return workload.head(options.num_prompts) if options.num_prompts else workload
    return draw(options.distribution, options.num_prompts or 1000, options.seed)


def _progress(policy: str) -> Callable[[int, int], None]:
    """Returns what reports the progress of `policy`, at most _PROGRESS_PARTS times."""
    last = -1

    def say(done: int, total: int) -> None:
        nonlocal last
        part = done * _PROGRESS_PARTS // max(1, total)
        if part != last:
            last = part
            sys.stderr.write(f"{policy} {done} {total}\n")
            sys.stderr.flush()

    return say


def simulate(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the document: the workload, the settings, and the figures of each policy.

    Raises:
        ConfigError: a setting or the trace is not possible.
    """
    if options.plot:
        plot.check(options.plot)
    workload = _workload(options)
    blocks = options.pool_tokens // options.block_size
    if blocks * options.block_size < options.max_model_len:
        message = (
            f"--pool-tokens: found {options.pool_tokens}, at least --max-model-len ({options.max_model_len}) is needed"
        )
        raise ConfigError(message, field="pool_tokens")
    spec = PoolSpec(blocks + 1, options.block_size, 1, "simulated", "float16", options.max_model_len)
    limits = Limits(
        options.max_num_seqs,
        options.max_num_batched_tokens,
        step_seconds=options.step_ms / 1000,
        timed_arrivals=options.arrivals == "trace",
        swap_slot_count=options.swap_tokens // options.block_size,
    )
    results = [
        Simulation(name, POLICIES[name](spec), workload, limits, _progress(name)).run()
        for name in options.policies.split(",")
    ]
    if options.plot:
        title = (
            f"{len(workload):,} requests of {Path(workload.name).name}, a pool of {options.pool_tokens:,} token slots"
        )
        plot.draw(results, title, options.plot)
    return {
        "workload": {"name": workload.name, "requests": len(workload)},
        "policies": {result.policy: result.document() for result in results},
    }


def main() -> int:
    """Runs the command. Errors are a document as well: {"error": {reason, message, field}}, exit status 1."""
    parser = argparse.ArgumentParser(prog="python -m gateway.simulate", description=__doc__)
    parser.add_argument("--trace", default="", help="a CSV or JSONL file")
    parser.add_argument("--distribution", default="sharegpt", help="sharegpt or fixed:PROMPT,OUTPUT")
    parser.add_argument("--arrivals", choices=("saturated", "trace"), default="saturated", help="when requests come")
    parser.add_argument("--policies", default=",".join(POLICIES), help="names with commas between")
    for name, default in (
        ("num-prompts", 0),
        ("seed", 0),
        ("block-size", 16),
        ("max-model-len", 2048),
        ("pool-tokens", 14_336),
        ("swap-tokens", 0),
        ("max-num-seqs", 1024),
        ("max-num-batched-tokens", 8192),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--step-ms", type=float, default=30.0, help="duration of a step")
    parser.add_argument("--plot", default="", help="draw memory over time into this .png or .svg file")
    options = parser.parse_args()
    return print_document(lambda: simulate(options), "simulate")


if __name__ == "__main__":
    sys.exit(main())
