"""All measurements of the scheduler and of the gateway around it, round by round, beside the peer's scheduler."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import gc
from pathlib import Path
from typing import Any

from gateway.bench.bare_server import BareStack
from gateway.bench.front import Front, Window
from gateway.bench.null_stack import NullStack
from gateway.bench.runner import environment, local_memory
from gateway.bench.scheduler_report import FEW, MANY, build_document
from gateway.bench.scheduling import LoopSteps
from memsvc.bench.peer import Peer
from memsvc.bench.samples import Samples, merge

PEER_SCRIPT = Path(__file__).with_name("vllm_scheduler.py")
_PACED_STEP_SECONDS = 0.06
"""Longer than the clients and the gateway need for a message to each of 256 streams on a slow core."""
_SETTLE_SECONDS = 0.5


async def run(
    block_size: int, rounds: int, peer: Peer | None, progress: Callable[[str], None], *, window_seconds: float = 3.0
) -> dict[str, Any]:
    """Takes all measurements; returns the report.

    Args:
        block_size: tokens in a block.
        rounds: times that each is taken; ours and the peer's alternate within a round.
        peer: a started peer, or none.
        progress: hears what is done next.
        window_seconds: how long messages are counted, in each round.

    Raises:
        QuireError: a service or the peer failed.
    """
    ours: Samples = {}
    theirs: Samples = {}
    async with contextlib.AsyncExitStack() as stack:
        loops = {}
        for count in (FEW, MANY):
            progress(f"admitting {count} sequences")
            loops[count] = LoopSteps(*await local_memory(stack, block_size), count)
            await loops[count].start()
        # What was made so far stays: without this each collection looks at all of it again.
        gc.collect()
        gc.freeze()
        for number in range(rounds):
            for count, loop in loops.items():
                progress(f"round {number + 1} of {rounds}: steps of {count} sequences")
                taken = await loop.steps(2 * block_size)
                merge(ours, {f"{name}_{count}": values for name, values in taken.items()})
                if peer is not None:
                    merge(theirs, await peer.sample(f"steps {count}"))
    pace = _PACED_STEP_SECONDS
    windows = []
    for stack_of, what in (
        (NullStack(FEW, pace, block_size), f"streams, steps of {pace * 1e3:g} ms"),
        (BareStack(pace), f"bare streams, messages every {pace * 1e3:g} ms"),
        (NullStack(FEW, 0.0, block_size), "streams, as fast as they go"),
    ):
        windows.append(await _windows(stack_of, what, rounds, window_seconds, progress))
    paced, bare, unpaced = windows
    return build_document(
        ours,
        theirs,
        paced,
        bare,
        unpaced,
        environment=environment(block_size, rounds),
        peer=peer.about if peer is not None else {},
    )


async def _windows(
    services: NullStack | BareStack, what: str, rounds: int, seconds: float, progress: Callable[[str], None]
) -> list[Window]:
    """Counts on services started anew."""
    progress(f"starting {what}")
    front = Front(FEW, services)
    try:
        await front.start()
        windows = []
        for number in range(rounds):
            progress(f"round {number + 1} of {rounds}: {what}")
            # The first messages of a window are not those of the one before.
            await front.count(_SETTLE_SECONDS)
            windows.append(await front.count(seconds))
        return windows
    finally:
        await front.close()
