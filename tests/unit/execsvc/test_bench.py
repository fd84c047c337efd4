"""`quire bench engine` measures what it says, and says what it could not measure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from execsvc.bench import __main__ as bench_command
from execsvc.bench import ceilings, host_part
from execsvc.bench.report import Request, measure
from execsvc.bench.workload import Bench
from execsvc.config import ExecsvcConfig
from quire.cli.bench_engine import show
from quire.errors import InvariantError
from tests.unit.execsvc import tiny


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures little."""
    monkeypatch.setattr(host_part, "_WARMUP_STEPS", 2)
    monkeypatch.setattr(host_part, "_STEPS", 16)
    monkeypatch.setattr(ceilings, "_CPU_COPY_BYTES", 2**20)
    monkeypatch.setattr(ceilings, "_CPU_MATMUL_SIZE", 64)


@pytest.mark.usefixtures("quick")
def test_an_engine_is_measured_beside_what_the_device_can_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise nobody could tell a slow model from a slow engine. What does not fit is said, not left out."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny.hf_config(tiny.CONFIG)))
    config = ExecsvcConfig(
        model=str(path), load_format="dummy", device="cpu", dtype="float32", kv_cache_tokens=1024, max_model_len=512,
        num_threads=1, max_num_seqs=4,
    )  # fmt: skip
    document = measure(Request(config, (1, 4), (32, 480), (40,), 4), lambda _: None)
    small, long, batch, large = document["decode"]
    assert [row["batch"] * row["context"] for row in document["decode"]] == [32, 480, 128, 1920]
    assert "skipped" in large
    assert "host_us" not in small
    for row in (small, long, batch):
        assert row["tokens_per_second"] == pytest.approx(row["batch"] * 1e6 / row["step_us"]["median"])
        assert row["share_of_copy_bandwidth"] > 0
    # Four times the sequences read four times the cache and the same weights.
    token_bytes = document["budget"]["bytes_per_block"] // 16
    length = 32 + 2 + 2
    assert batch["bytes_per_step"] - small["bytes_per_step"] == 3 * length * token_bytes
    embeddings = tiny.CONFIG.vocab_size * tiny.CONFIG.hidden_size
    assert small["bytes_per_step"] == 4 * (document["parameters"] - embeddings) + length * token_bytes
    assert document["prefill"][0]["share_of_matmul_rate"] > 0
    document["peer"] = {"name": "a peer", "decode": [{"batch": 1, "context": 32, "tokens_per_second": 5.0}]}
    json.dumps(document)
    show(document)
    shown = capsys.readouterr().out
    assert "does not fit" in shown
    assert "peer: a peer" in shown
    assert "launches left out" in shown


@pytest.mark.usefixtures("quick")
def test_the_host_s_part_is_measured_without_a_device() -> None:
    """The figure is of a CPU and must come out wherever there is one."""
    found = host_part.measure(8)
    assert 0 < found["low_us"] <= found["median_us"] <= found["high_us"]


def test_a_step_that_fails_is_no_figure() -> None:
    """Otherwise a refused plan, which takes no time, would be the best result of all."""
    engine = tiny.engine_of(blocks=4)
    with pytest.raises(InvariantError, match="measurement failed"):
        Bench(engine).decode(2, 60, 1, 4)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [(["--batches", "0"], "batches"), (["--steps", "0"], "steps"), (["--contexts", ""], "contexts")],
)
def test_a_request_for_nothing_is_refused(arguments: list[str], field: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A document that says why, for programs as for people."""
    assert bench_command.main(arguments) == 1
    error: dict[str, Any] = json.loads(capsys.readouterr().out)["error"]
    assert error["field"] == field
