"""Compiles every kernel for GPUs that are not there, and measures what the compiler made of it.

    python tests/kernels/compile_gate.py             one JSON line for each compiled kernel
    python tests/kernels/compile_gate.py --rewrite   writes them to compiled.json, the committed table
    python tests/kernels/compile_gate.py --case kv   only the cases whose name contains a word

The host functions run as in production, with CPU tensors; each launch is compiled for the target and not run. What is
compiled is thus specialised as in production: by strides, alignment, constants and options. A fake driver answers what
the compiler asks. Figures come from the tools inside the triton package. TRITON_CACHE_DIR keeps compiled kernels (its
key covers source, options, target and compiler) and the figures beside them, so that a second run takes seconds.

Cases are in `compile_cases/`, a module for each package of kernels, with a list `CASES`.
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Callable, Iterator
import dataclasses
import hashlib
import importlib.util
import json
import os
from pathlib import Path
import re
import subprocess
import sys
import tempfile
from typing import Any

TARGETS = (80, 90, 100)
"""Compute capabilities times ten: A100, H100, B200."""
CASES_FOLDER = Path(__file__).with_name("compile_cases")
TABLE = Path(__file__).with_name("compiled.json")


@dataclasses.dataclass(frozen=True)
class Expectation:
    """What one kernel's machine code must contain."""

    wide_async: bool = False
    """16-byte asynchronous copies to shared memory, and none narrower: its loop over the KV cache is pipelined."""
    matrix_unit: bool = False
    """Warpgroup matrix instructions on sm_90 and tensor-memory ones on sm_100, not those of older parts."""
    wide_loads: bool = False
    """16-byte loads and stores of global memory: it moves data at full width."""


@dataclasses.dataclass(frozen=True)
class CompileCase:
    """Launches to compile."""

    name: str
    """Says shape and type; part of the key in the table."""
    launch: Callable[[], object]
    """Calls host functions with CPU tensors. Imports them itself: nothing is interpreted here."""
    expectations: dict[str, Expectation] = dataclasses.field(default_factory=dict)
    """By kernel name. A kernel that is named must be launched."""
    targets: tuple[int, ...] = TARGETS


class TargetDriver:
    """Answers for a device of one compute capability."""

    def __init__(self) -> None:
        self.capability = 0

    def get_current_target(self) -> Any:
        """The target to compile for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> Any:
        """Where tensors lie."""
        import torch

        return torch.device("cpu")

    def get_current_device(self) -> int:
        """Key of the compiled kernels in this process."""
        return self.capability

    def set_current_device(self, device: int) -> None:
        """Nothing to set."""

    def get_current_stream(self, device: int) -> int:
        """No stream."""
        return 0

    def map_python_to_cpp_type(self, kind: str) -> str:
        """Types as they are."""
        return kind

    def is_active(self) -> bool:
        """Always."""
        return True


def load_cases(word: str = "") -> list[CompileCase]:
    """Returns the cases of every module in `compile_cases/` whose name contains `word`."""
    found: list[CompileCase] = []
    for path in sorted(CASES_FOLDER.glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"compile_cases_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found += [case for case in module.CASES if word in case.name]
    return found


def triton_version() -> str:
    """Returns the minor version of triton: compilers differ in what they allocate."""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def machine_code_figures(cubin: bytes) -> dict[str, int]:
    """Returns registers, stack bytes and counts of instructions of a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", "-sass", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", listing)
    assert usage is not None, listing[:1000]

    def occurrences(pattern: str) -> int:
        return len(re.findall(pattern, listing))

    return {
        "registers": int(usage[1]),
        "stack_bytes": int(usage[2]),
        "spill_instructions": occurrences(r"\b(?:LDL|STL)\b"),
        "narrow_async": occurrences(r"\bLDGSTS\b") - occurrences(r"\bLDGSTS\S*\.128\b"),
        "wide_async": occurrences(r"\bLDGSTS\S*\.128\b") + occurrences(r"\bUTMALDG"),
        "matrix_unit": occurrences(r"\b(?:HGMMA|QGMMA|UTC\w*MMA)\b"),
        "wide_loads": occurrences(r"\bLDG\.\S*\b128\b"),
        "wide_stores": occurrences(r"\bSTG\.\S*\b128\b"),
    }


def _remembered_figures(cubin: bytes) -> dict[str, int]:
    """Returns `machine_code_figures`, kept beside the compiled kernels when there is a folder for them."""
    folder = os.environ.get("TRITON_CACHE_DIR")
    if folder is None:
        return machine_code_figures(cubin)
    key = hashlib.sha256(Path(__file__).read_bytes() + cubin).hexdigest()
    path = Path(folder) / f"figures-{key}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(machine_code_figures(cubin)))
    found: dict[str, int] = json.loads(path.read_text())
    return found


def compile_cases(cases: list[CompileCase], targets: tuple[int, ...] = TARGETS) -> Iterator[dict[str, Any]]:
    """Compiles and yields the figures of each launch. This process cannot run kernels afterwards."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    stand_in = TargetDriver()
    driver.set_active(stand_in)
    stock = JITFunction.run
    launched: list[tuple[str, Any]] = []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = stock(self, *args, grid=grid, warmup=True, **options)
        compiled = compiled.result() if hasattr(compiled, "result") else compiled
        launched.append((self.fn.__name__, compiled))
        return compiled

    JITFunction.run = compile_only
    for capability in targets:
        stand_in.capability = capability
        for case in cases:
            if capability not in case.targets:
                continue
            launched.clear()
            case.launch()
            seen: collections.Counter[str] = collections.Counter()
            for kernel, compiled in launched:
                seen[kernel] += 1
                nth = f" #{seen[kernel]}" if seen[kernel] > 1 else ""
                yield {
                    "case": case.name,
                    "kernel": kernel,
                    "key": f"{case.name}: {kernel}{nth}",
                    "capability": capability,
                    "shared_bytes": compiled.metadata.shared,
                    "warps": compiled.metadata.num_warps,
                    **_remembered_figures(compiled.asm["cubin"]),
                }


def rewrite_table(figures: list[dict[str, Any]]) -> None:
    """Replaces this triton version's part of the committed table."""
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    part: dict[str, dict[str, list[int]]] = {}
    for figure in figures:
        row = part.setdefault(f"sm_{figure['capability']}", {})
        row[figure["key"]] = [figure["registers"], figure["shared_bytes"]]
    table[triton_version()] = part
    lines = []
    for version, targets in sorted(table.items()):
        groups = []
        for target, rows in sorted(targets.items(), key=lambda item: int(item[0][3:])):
            entries = ",\n".join(f"   {json.dumps(key)}: {json.dumps(row)}" for key, row in sorted(rows.items()))
            groups.append(f"  {json.dumps(target)}: {{\n{entries}\n  }}")
        lines.append(f" {json.dumps(version)}: {{\n" + ",\n".join(groups) + "\n }")
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description="Compile every kernel for GPUs that are not there.")
    parser.add_argument("--rewrite", action="store_true", help="write the committed table")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    options = parser.parse_args()
    if options.rewrite and options.case:
        parser.error("--rewrite writes the whole table: it goes without --case")
    figures = []
    for figure in compile_cases(load_cases(options.case)):
        figures.append(figure)
        sys.stdout.write(json.dumps(figure) + "\n")
    if options.rewrite:
        rewrite_table(figures)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    # The cases import this module by its name: one set of classes, not two.
    from tests.kernels import compile_gate

    compile_gate.main()
