"""Figures of a run: rates, shares of what the device can do, and ratios to peers."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton

from kernels.bench.cases import FAMILIES, Case
from kernels.bench.clock import Clock, Spread, ceilings
from kernels.bench.problem import Scale

MICROSECONDS = 1e6


def measure(
    clock: Clock, device: torch.device, scale: Scale, say: Callable[[str], None], *, shrink: int = 1
) -> dict[str, Any]:
    """Measures every kernel and its peers, and returns the document.

    Args:
        clock: to measure with.
        device: to measure on.
        scale: sizes.
        say: told what is measured now.
        shrink: divisor of the sizes of the ceilings, for a dry run.
    """
    say("ceilings")
    limits = ceilings(clock, device, scale=shrink)
    cases = [_figures(case, clock, limits, say) for case in _cases(scale, device)]
    return {"environment": environment(device), "ceilings": limits, "kernels": cases}


def environment(device: torch.device) -> dict[str, Any]:
    """Returns what was measured on."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "interpreter",
        "capability": list(torch.cuda.get_device_capability(device)) if cuda else [],
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def _cases(scale: Scale, device: torch.device) -> Iterator[Case]:
    for family in FAMILIES:
        yield from family(scale, device)


def _figures(case: Case, clock: Clock, limits: dict[str, float], say: Callable[[str], None]) -> dict[str, Any]:
    """Returns the figures of one case."""
    say(case.name)
    spread = clock.time(case.ours)
    found: dict[str, Any] = {"name": case.name, "us": _microseconds(spread)}
    if case.moved_bytes:
        rate = case.moved_bytes / spread.median
        found |= {"bytes": case.moved_bytes, "bytes_per_second": rate}
        found["share_of_copy"] = rate / limits["copy_bytes_per_second"]
    if case.flops:
        rate = case.flops / spread.median
        found |= {"flops": case.flops, "flops_per_second": rate, "share_of_matmul": rate / limits["matmul_flops"]}
    peers: dict[str, dict[str, Any]] = {}
    for name, work in case.peers.items():
        say(f"{case.name}: {name}")
        try:
            theirs = clock.time(work)
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is its result
            peers[name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
        else:
            peers[name] = {"us": _microseconds(theirs), "times_faster": theirs.median / spread.median}
    return found | {"peers": peers}


def _microseconds(spread: Spread) -> dict[str, float]:
    return {
        "median": spread.median * MICROSECONDS,
        "low": spread.low * MICROSECONDS,
        "high": spread.high * MICROSECONDS,
    }
