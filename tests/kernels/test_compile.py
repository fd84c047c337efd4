"""Every kernel compiles for the GPUs that it is meant for, without one at hand."""

from __future__ import annotations

import json
from pathlib import Path
import subprocess
import sys

import pytest

SCRIPT = Path(__file__).with_name("compile_for.py")
KERNELS = {"_kv_write", "_block_copy", "_decode_split", "_decode_merge", "_prefill"}
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that a block may use, by compute capability (CUDA programming guide)."""


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_without_spills(capability: int) -> None:
    """A kernel that spills registers or wants too much shared memory would be slow, or not start at all."""
    command = [sys.executable, SCRIPT, str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = [json.loads(line) for line in done.stdout.splitlines()]
    assert {figure["kernel"] for figure in figures} == KERNELS
    for figure in figures:
        assert figure["spill_instructions"] == 0, figure
        assert figure["stack_bytes"] == 0, figure
        assert figure["shared_bytes"] <= SHARED_LIMIT[capability], figure
