"""Chooses launch options by measuring them, and writes the table of the device at hand."""

from collections.abc import Callable, Mapping
import itertools
import json
from pathlib import Path
from typing import Any

import torch

from kernels import configs
from kernels.bench.cases import FAMILIES, Case
from kernels.bench.clock import Clock
from kernels.bench.problem import Scale

CHOICES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "block_move": {"elements": (1024, 2048, 4096, 8192), "num_warps": (2, 4, 8)},
    "kv_write": {"num_warps": (1, 2, 4, 8)},
    "rms_norm": {"elements": (4096, 8192), "num_warps": (2, 4, 8, 16)},
    "rotate_and_write": {"elements": (256, 512, 1024, 2048), "num_warps": (1, 2, 4, 8)},
    "sampling": {"scan_runs": (16, 32, 64), "scan_warps": (4, 8), "gather_runs": (16,), "tile": (512, 1024),
                 "choose_warps": (8, 16)},
    "silu_mul": {"elements": (512, 1024, 2048, 4096), "num_warps": (2, 4, 8)},
}  # fmt: skip
"""What is tried, by the kernel's name in the tables: every combination."""


def tune(clock: Clock, device: torch.device, scale: Scale, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Measures every combination of options on the cases of its kernel, and writes the fastest.

    A combination counts by the sum of what its cases take, relative to the defaults.

    Args:
        clock: to measure with.
        device: to measure on.
        scale: sizes.
        folder: where the table goes, named after the device.
        say: told what is measured now.

    Returns:
        The table's path, and for each kernel the options and how many times faster than the defaults they are.
    """
    cases: dict[str, list[Case]] = {}
    for family in FAMILIES:
        for case in family(scale, device):
            if case.kernel in CHOICES:
                cases.setdefault(case.kernel, []).append(case)
    table: dict[str, list[dict[str, Any]]] = {}
    gains: dict[str, Any] = {}
    for kernel, mine in cases.items():
        say(kernel)
        before = [clock.time(case.ours).median for case in mine]
        best, least = None, float(len(mine))
        for values in itertools.product(*CHOICES[kernel].values()):
            use = dict(zip(CHOICES[kernel], values, strict=True))
            with configs.override(kernel, use):
                taken = sum(clock.time(case.ours).median / usual for case, usual in zip(mine, before, strict=True))
            if taken < least:
                best, least = use, taken
        if best is not None:
            table[kernel] = [{"when": _where(kernel, scale), "use": best}]
            gains[kernel] = {"use": best, "times_faster": len(mine) / least}
    path = folder / f"{configs.device_table_name(device)}.json"
    path.write_text(_layout(table))
    configs.forget()
    return {"path": str(path), "kernels": gains}


def _where(kernel: str, scale: Scale) -> dict[str, Any]:
    """Returns the launches that a measurement speaks for; the defaults hold for others."""
    properties: dict[str, dict[str, Any]] = {
        "kv_write": {"head_dim": scale.head_dim},
        "rms_norm": {"size": {"at_least": scale.hidden // 2}},
        "rotate_and_write": {"head_dim": scale.head_dim},
        "sampling": {"vocabulary": {"at_least": scale.vocabulary // 4}},
        "silu_mul": {"size": {"at_least": scale.inner // 4}},
    }
    return properties.get(kernel, {})


def _layout(table: dict[str, list[dict[str, Any]]]) -> str:
    """Returns the table as text, one entry a line."""
    kernels = []
    for kernel, entries in sorted(table.items()):
        lines = ",\n".join(f"    {json.dumps(entry)}" for entry in entries)
        kernels.append(f"  {json.dumps(kernel)}: [\n{lines}\n  ]")
    return "{\n" + ",\n".join(kernels) + "\n}\n"
