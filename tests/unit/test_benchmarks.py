"""The scripts that claims are measured with start."""

from __future__ import annotations

from pathlib import Path
import subprocess
import sys

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
# One needs a package that nothing else does, and says so.
ELSEWHERE = {"shortage_bound.py"}


@pytest.mark.parametrize("script", sorted(path.name for path in FOLDER.glob("*.py") if path.name not in ELSEWHERE))
def test_a_benchmark_starts(script: str) -> None:
    """A claim whose command ends with an ImportError is worth nothing, and nobody else notices what it imports."""
    command = [sys.executable, str(FOLDER / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout
