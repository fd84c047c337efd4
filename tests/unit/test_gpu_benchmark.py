"""`benchmarks/gpu.py`, as far as it goes without a GPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
import sys
import time
from types import ModuleType
from typing import Any

import pytest
import torch

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("gpu_benchmark", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_device_it_says_so(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Otherwise a run on the wrong machine would leave a file of figures that mean nothing."""
    assert gpu.main([]) == 2
    assert "no CUDA device: nothing was measured" in capsys.readouterr().err


def _run(gpu: ModuleType, code: str, limit: float = 30.0, **options: Any) -> dict[str, Any]:
    """Returns what a part of this code is recorded as."""
    found: dict[str, Any] = gpu.run_part(gpu.Part("part", [sys.executable, "-c", code], limit, **options), 30.0)
    return found


def test_a_part_that_fails_is_named_and_the_others_go_on(gpu: ModuleType) -> None:
    """Eight minutes of a rare machine must not be lost to one broken part."""
    assert _run(gpu, "print('noise'); print('{\"a\": 1}')")["document"] == {"a": 1}
    refused = _run(gpu, 'print(\'{"error": {"message": "no room"}}\')')
    assert refused["failed"] == "no room"
    assert _run(gpu, "print('no document')")["failed"] == "printed no document"
    broken = _run(gpu, "print('last words'); raise SystemExit(3)", reads_json=False)
    assert broken["failed"] == "ended with status 3"
    assert broken["tail"] == ["last words"]
    assert "longer than" in _run(gpu, "import time; time.sleep(60)", limit=0.2)["failed"]
    assert gpu.run_part(gpu.Part("late", ["false"], 10.0), 0.0) == {"failed": "no time was left"}
    lacking = gpu.run_part(gpu.Part("bare", ["false"], 10.0, needs={"no_such_module": "nothing"}), 10.0)
    assert "no_such_module" in lacking["failed"]


def test_a_part_that_takes_too_long_ends_with_all_that_it_started(gpu: ModuleType, tmp_path: Path) -> None:
    """What goes on would be measured together with the next part."""
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(2); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    found = _run(gpu, code, limit=1.0)
    assert "longer than" in found["failed"] and "begun" in found["tail"]
    time.sleep(2.5)
    assert not mark.exists()


def test_what_has_no_wheel_is_named_and_the_rest_installed(gpu: ModuleType, tmp_path: Path) -> None:
    """One wheel that was forgotten must not cost the whole run."""
    failures = gpu.install(tmp_path, tmp_path / "target", ["structlog", "google.rpc"])
    assert failures == [
        f"googleapis-common-protos: no wheel in {tmp_path}", f"structlog: no wheel in {tmp_path}"
    ]  # fmt: skip


def test_the_parts_are_the_project_s_own_and_stay_within_the_time(gpu: ModuleType) -> None:
    """A command that does not exist would be found on the GPU machine only."""
    found = {part.name: part for part in gpu.parts("auto")}
    assert {"kernels", "engine", "kernel tests"} <= set(found)
    assert all(part.needs for part in found.values())
    assert gpu.SECONDS < 480
    assert json.loads(gpu.SHAPE.read_text())["num_hidden_layers"] == 32
    from execsvc.bench.__main__ import _parser, _request

    command = found["engine"].command
    request = _request(_parser().parse_args(command[command.index("execsvc.bench") + 1 :]))
    assert request.batches == (1, 16, 64, 256)
    assert request.config.max_model_len is not None
    assert request.config.max_model_len > max(request.contexts)


def test_the_table_tells_the_figures_and_what_failed(gpu: ModuleType) -> None:
    """It is all that one sees of a run from afar."""
    row = {"batch": 64, "context": 512, "step_us": {"median": 9000.0}, "host_us": {"median": 700.0}}
    row |= {"tokens_per_second": 7111.0, "share_of_copy_bandwidth": 0.8}
    engine = {
        "ceilings": {"copy_bytes_per_second": 3e12, "matmul_flops": 8e14},
        "budget": dict.fromkeys(("available", "weights", "activations", "graphs", "kv_cache"), 2**30),
        "decode": [row, {"batch": 256, "context": 8192, "skipped": "does not fit"}],
        "prefill": [{"length": 2048, "tokens_per_second": 5000.0, "share_of_matmul_rate": 0.4}],
        "peer": {"decode": [{"batch": 64, "context": 512, "tokens_per_second": 3000.0}]},
    }
    peers = {"flashinfer": {"times_faster": 1.25}, "other": {"failed": "ImportError"}}
    kernel = {"name": "decode", "us": {"median": 50.0}, "share_of_copy": 0.87, "peers": peers}
    document = {
        "environment": {"device": "a device", "torch": "2.11"},
        "parts": {
            "kernel tests": {"failed": "ended with status 1", "tail": ["1 failed"]},
            "kernels": {"seconds": 80.0, "document": {"kernels": [kernel]}},
            "engine": {"seconds": 90.0, "document": engine},
        },
    }
    found = gpu.table(document)
    for text in (
        "ended with status 1  1 failed",
        "64 x 512",
        "7111",
        "80%",
        "3000",
        "does not fit",
        "3.00 TB/s",
        "40%",
    ):
        assert text in found
