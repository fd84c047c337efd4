"""Measuring without a device: every case and the search run in the interpreter, on a clock that is told."""

from __future__ import annotations

from collections.abc import Callable
import importlib
import json
from pathlib import Path
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels import configs


@pytest.fixture
def bench(watch: Any, device: torch.device) -> Any:
    """The measuring modules, imported under the interpreter."""
    if device.type != "cpu":
        pytest.skip("a device is measured by `quire bench kernels`")
    from kernels.bench import clock, problem, report, tune

    return SimpleNamespace(spread=clock.Spread, tiny=problem.TINY, measure=report.measure, tune=tune)


class ToldClock:
    """Runs the work once and says what it was told, in turn."""

    def __init__(self, spread: Callable[..., Any], seconds: Callable[[], float]) -> None:
        self._spread, self._seconds = spread, seconds
        self.count = 0

    def time(self, work: Callable[[], object]) -> Any:
        """See Clock."""
        work()
        self.count += 1
        taken = self._seconds()
        return self._spread(taken, taken / 2, taken * 2)


def test_every_kernel_is_measured_beside_its_peers(bench: Any) -> None:
    """A case that calls its kernel wrongly would be found on the GPU machine, where time is dear."""
    clock = ToldClock(bench.spread, lambda: 1e-3)
    said: list[str] = []
    document = bench.measure(clock, torch.device("cpu"), bench.tiny, said.append, shrink=4096)
    kernels = {kernel["name"]: kernel for kernel in document["kernels"]}
    assert {"decode, even", "decode, ragged", "decode, one", "prefill", "rms_norm", "add_rms_norm", "silu_mul"} <= set(
        kernels
    )
    assert {"kv_write", "rotate_and_write", "block_copy", "gather_blocks", "scatter_blocks"} <= set(kernels)
    assert {"most_likely", "sample, all kept", "sample, top_p 0.9", "sample, top_k 50, top_p 0.9"} <= set(kernels)
    assert {"decode, even, float8", "cascade, half shared", "prefill, a turn on a long context"} <= set(kernels)
    assert "decode without groups" in kernels["cascade, half shared"]["peers"]
    assert not [peer for kernel in kernels.values() for peer in kernel["peers"].values() if "failed" in peer]
    even = kernels["decode, even"]
    assert even["bytes"] == 2 * 20 * 2 * 2 * 64 * 2
    assert even["bytes_per_second"] == pytest.approx(even["bytes"] * 1e3)
    assert even["share_of_copy"] == pytest.approx(
        even["bytes_per_second"] / document["ceilings"]["copy_bytes_per_second"]
    )
    assert even["peers"]["torch SDPA on contiguous keys"]["times_faster"] == 1.0
    assert "share_of_matmul" in kernels["prefill"]
    assert json.loads(json.dumps(document)) == document
    assert "decode, even" in said


def test_ragged_batches_hold_as_many_tokens_as_even_ones(bench: Any) -> None:
    """Otherwise the two could not be compared."""
    from kernels.bench.problem import Scale

    lengths = Scale().ragged_lengths()
    assert sum(lengths) == 64 * 2048 and len(lengths) == 64 and min(lengths) >= 1
    assert max(lengths) > 10 * min(lengths)


def test_the_fastest_options_are_written(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of a device must hold what was measured best, and be one that the kernels can read."""
    monkeypatch.setattr(
        bench.tune, "CHOICES", {"silu_mul": {"elements": (64, 128), "num_warps": (4,)}, "kv_write": {"num_warps": (1,)}}
    )
    used: list[Any] = []

    def seconds() -> float:
        options = configs._overrides.get("silu_mul")
        used.append(options)
        return 2.0 if options is None else 1.0 if options["elements"] == 128 else 1.5

    found = bench.tune.tune(ToldClock(bench.spread, seconds), torch.device("cpu"), bench.tiny, tmp_path, lambda _: None)
    assert found["kernels"] == {"silu_mul": {"use": {"elements": 128, "num_warps": 4}, "times_faster": 2.0}}
    table = json.loads(Path(found["path"]).read_text())
    assert configs.check_table(table, "found") == {
        "silu_mul": [{"when": {"size": {"at_least": 16}}, "use": {"elements": 128, "num_warps": 4}}]
    }
    assert {"elements": 64, "num_warps": 4} in used
    assert configs._overrides == {}


def test_without_a_device_nothing_is_measured_or_written() -> None:
    """Figures that are no GPU's would be mistaken for some; a table from nowhere would slow a real device down."""
    if torch.cuda.is_available():
        return
    before = sorted(configs.FOLDER.iterdir())
    command = [sys.executable, "-m", "kernels.bench", "--json", "--tune"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    errors = [
        json.loads(done.stdout)["error"],
        importlib.import_module("kernels.bench.__main__").run(tuning=False)["error"],
    ]
    for error in errors:
        assert error["reason"] == "NO_DEVICE" and "a CUDA device is needed" in error["message"]
    assert sorted(configs.FOLDER.iterdir()) == before
