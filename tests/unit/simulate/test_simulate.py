"""The simulator: policies side by side on the real scheduler and memory core."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gateway.simulate.__main__ import POLICIES
from gateway.simulate.plot import thinned
from quire.cli.main import run
from quire.cli.simulate import _POLICIES

TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2224670,879,55
2023-11-16 18:15:51.3910170,91,16
"""
"""The first rows of the Azure LLM inference trace of 2023 (CC-BY-4.0)."""


def simulate(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, float]]:
    """Returns the figures of each policy."""
    assert run(["simulate", "--json", *arguments]) == 0
    policies: dict[str, dict[str, float]] = json.loads(capsys.readouterr().out)["policies"]
    return policies


def test_every_request_is_served_under_every_policy(capsys: pytest.CaptureFixture[str]) -> None:
    """Otherwise a policy looks good by losing requests."""
    policies = simulate(capsys, "--distribution", "fixed:40,24", "--num-prompts", "30", "--max-model-len", "256")
    assert list(policies) == list(POLICIES) == list(_POLICIES)
    assert {figures["finished_count"] for figures in policies.values()} == {30}
    assert {figures["finished_output_tokens"] for figures in policies.values()} == {30 * 24}


def test_paged_memory_holds_more_sequences_than_contiguous(capsys: pytest.CaptureFixture[str]) -> None:
    """Otherwise paging is not worth its name."""
    policies = simulate(capsys, "--num-prompts", "60", "--policies", "paged,contiguous")
    assert policies["contiguous"]["mean_concurrency"] <= 7
    assert policies["paged"]["mean_concurrency"] > 2 * policies["contiguous"]["mean_concurrency"]
    assert policies["paged"]["utilization"] > 2 * policies["contiguous"]["utilization"]


def test_with_host_memory_nothing_is_computed_twice(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever asks what host memory would save must not be told of transfers that are not made."""
    wanted = ("--num-prompts", "150", "--policies", "paged", "--pool-tokens", "8192")
    without = simulate(capsys, *wanted)["paged"]
    swapping = simulate(capsys, *wanted, "--swap-tokens", "100000")["paged"]
    assert without["recomputed_tokens"] > 0 == without["swapped_blocks"]
    assert swapping["recomputed_tokens"] == 0 < swapping["swapped_blocks"]
    assert swapping["finished_output_tokens"] == without["finished_output_tokens"]
    assert run(["simulate", *wanted, "--swap-tokens", "100000"]) == 0
    assert "blocks swapped" in capsys.readouterr().out


def test_a_trace_is_replayed_and_longer_requests_are_rejected(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Otherwise lengths of a real service cannot be tried."""
    trace = tmp_path / "trace.csv"
    trace.write_text(TRACE)
    figures = simulate(capsys, str(trace), "--policies", "paged", "--max-model-len", "512")["paged"]
    assert figures["rejected_count"] == 1
    assert figures["finished_output_tokens"] == 44 + 109 + 16


@pytest.mark.parametrize(("name", "magic"), [("memory.png", b"\x89PNG"), ("memory.svg", b"<?xml")])
def test_memory_over_time_is_drawn(name: str, magic: bytes, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A figure says how much was wasted; a picture says when and why."""
    path = tmp_path / name
    arguments = ["--distribution", "fixed:40,24", "--num-prompts", "9", "--policies", "paged,contiguous"]
    assert run(["simulate", *arguments, "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(magic)
    assert "drawn into" in capsys.readouterr().err


def test_what_is_drawn_is_the_mean_over_equal_runs_of_steps() -> None:
    """A long run has more steps than a picture has columns: to leave some out would hide what happened in them."""
    columns = np.array([np.arange(6000), np.full(6000, 50)])
    steps, shares = thinned(columns, 100)
    assert (len(steps), shares.shape) == (600, (2, 600))
    assert shares[0, 0] == pytest.approx(np.arange(10).mean() / 100)
    assert set(shares[1].round(9)) == {0.5}
    assert thinned(columns[:, :3], 100)[0].tolist() == [0.5, 1.5, 2.5]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--policies", "slab"], "--policies: found 'slab', allowed are paged"),
        (["--block-size", "17"], "--block-size: found 17, allowed are 16, 32 and 64"),
        (["--pool-tokens", "1024"], "--pool-tokens: found 1024"),
        (["--distribution", "uniform"], "--distribution: found 'uniform'"),
        (["no-such-file.csv"], "no-such-file.csv"),
        (["--plot", "memory.gif"], "--plot: found 'memory.gif', a name that ends in .png or .svg is expected"),
        (["--plot", "no-such-place/memory.png"], "--plot: there is no directory 'no-such-place'"),
    ],
)
def test_a_wrong_setting_is_named(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Otherwise the user has to guess."""
    assert run(["simulate", *arguments]) == 2
    assert expected in capsys.readouterr().err


def test_a_row_that_is_no_length_is_named_by_its_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Otherwise one bad row of a hundred thousand is not found."""
    trace = tmp_path / "trace.csv"
    trace.write_text(TRACE + "2023-11-16 18:15:52.5732450,ninety-one,16\n")
    assert run(["simulate", str(trace)]) == 2
    error = capsys.readouterr().err
    assert "trace.csv" in error
    assert "6" in error
