"""`quire bench kernels` and `quire tune`: what people see."""

from __future__ import annotations

import json

import pytest

from quire.cli import bench_kernels
from quire.cli.main import run
from quire.errors import QuireError

DOCUMENT = {
    "environment": {"device": "X1", "capability": [9, 0], "torch": "2.11", "triton": "3.6"},
    "ceilings": {"copy_bytes_per_second": 3.0e12, "matmul_flops": 7.0e14},
    "kernels": [
        {
            "name": "rms_norm",
            "us": {"median": 50.0, "low": 49.0, "high": 52.0},
            "share_of_copy": 0.875,
            "peers": {"torch": {"us": {"median": 100.0}, "times_faster": 2.0}, "flashinfer": {"failed": "no"}},
        },
        {
            "name": "prefill",
            "us": {"median": 900.0, "low": 890.0, "high": 999.0},
            "share_of_matmul": 0.5,
            "peers": {},
        },
    ],
}


def test_figures_stand_beside_ceilings_and_peers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A time alone says nothing: what counts is the share of what the device can do, and who is faster."""
    monkeypatch.setattr(bench_kernels, "run_measurements", lambda _: DOCUMENT)
    assert run(["bench", "kernels"]) == 0
    shown = capsys.readouterr().out
    for part in ("X1", "rms_norm", "88% of copy", "torch 2.00x", "flashinfer failed", "50% of product", "3,000 GB/s"):
        assert part in shown
    assert run(["bench", "kernels", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == DOCUMENT


def test_tuning_says_what_was_chosen_and_where_it_was_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that changes silently would be lost at the next installation."""
    chosen = {"path": "configs/x1.json", "kernels": {"silu_mul": {"use": {"num_warps": 4}, "times_faster": 1.25}}}
    monkeypatch.setattr(bench_kernels, "run_measurements", lambda _: chosen)
    assert run(["tune"]) == 0
    shown = capsys.readouterr().out
    for part in ("silu_mul", "num_warps 4", "1.25x", "configs/x1.json"):
        assert part in shown


def test_without_a_device_the_user_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The message must say what is missing, not show a traceback."""

    def refuse(_: list[str]) -> dict[str, object]:
        raise QuireError("a CUDA device is needed to measure kernels", reason="NO_DEVICE", field="")

    monkeypatch.setattr(bench_kernels, "run_measurements", refuse)
    assert run(["bench", "kernels"]) == 1
    shown = capsys.readouterr().err
    assert "a CUDA device is needed" in shown and "torch.cuda.is_available()" in shown
