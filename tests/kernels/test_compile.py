"""Every kernel compiles for the GPUs that it is meant for, without one at hand, into code that can be fast."""

from __future__ import annotations

import json
import os
from pathlib import Path
import subprocess
import sys
from typing import Any

import pytest

from tests.kernels import compile_gate

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that a block may use, by compute capability (CUDA programming guide)."""
REGISTER_TOLERANCE = 8
"""One step of what the hardware allocates."""
SHARED_TOLERANCE = 1024

Figures = list[dict[str, Any]]


@pytest.fixture(scope="module")
def figures(request: pytest.FixtureRequest) -> Figures:
    """Everything compiled once, in one process; what has not changed comes from the cache between runs."""
    cache = request.config.cache
    folder = Path(cache.mkdir("compiled")) if cache is not None else None
    environment = {**os.environ, "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if folder is not None:
        environment["TRITON_CACHE_DIR"] = str(folder)
    done = subprocess.run(
        [sys.executable, compile_gate.__file__], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("capability", compile_gate.TARGETS)
def test_nothing_spills_and_everything_fits(figures: Figures, capability: int) -> None:
    """A kernel that spills registers would be slow; one that wants too much shared memory would not start at all."""
    mine = [figure for figure in figures if figure["capability"] == capability]
    assert mine
    for figure in mine:
        assert figure["spill_instructions"] == 0, figure
        assert figure["stack_bytes"] == 0, figure
        assert figure["shared_bytes"] <= SHARED_LIMIT[capability], figure
        assert figure["registers"] * figure["warps"] * 32 <= 65536, figure


@pytest.mark.parametrize("case", compile_gate.load_cases(), ids=lambda case: case.name)
def test_the_machine_code_is_of_the_kind_that_is_meant(figures: Figures, case: compile_gate.CompileCase) -> None:
    """Narrow copies or old matrix instructions compile without complaint, and cost half of the speed."""
    mine = [figure for figure in figures if figure["case"] == case.name]
    assert {figure["capability"] for figure in mine} == set(case.targets)
    for kernel, expectation in case.expectations.items():
        launches = [figure for figure in mine if figure["kernel"] == kernel]
        assert launches, f"{case.name} launches no {kernel}"
        for figure in launches:
            if expectation.wide_async:
                assert figure["wide_async"] > 0 and figure["narrow_async"] == 0, figure
            if expectation.matrix_unit and figure["capability"] >= 90:
                assert figure["matrix_unit"] > 0, figure
            if expectation.wide_loads:
                assert figure["wide_loads"] > 0 and figure["wide_stores"] > 0, figure


def test_registers_and_shared_memory_are_those_of_the_table(figures: Figures) -> None:
    """They decide how many programs run side by side: a change must be seen and meant.

    `python tests/kernels/compile_gate.py --rewrite` writes the table. A version of triton that is not in it is not
    compared.
    """
    table = json.loads(compile_gate.TABLE.read_text()).get(compile_gate.triton_version())
    if table is None:
        return
    found = {(f"sm_{figure['capability']}", figure["key"]): figure for figure in figures}
    wanted = {(target, key): row for target, rows in table.items() for key, row in rows.items()}
    assert set(found) == set(wanted), "cases come and go: rewrite the table"
    for key, (registers, shared_bytes) in wanted.items():
        assert abs(found[key]["registers"] - registers) <= REGISTER_TOLERANCE, (key, registers, found[key])
        assert abs(found[key]["shared_bytes"] - shared_bytes) <= SHARED_TOLERANCE, (key, shared_bytes, found[key])
