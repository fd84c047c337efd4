"""Figures are computed from samples as their notes say, and their names are a contract."""

from __future__ import annotations

import json

import pytest

from memsvc.bench.report import FIGURES, PEER_FIGURES, build_report
from memsvc.bench.samples import Samples, median, merge, spread

KEYS = [
    "step_256_decodes_inprocess_us",
    "step_256_decodes_grpc_us",
    "admit_8192_cold_us",
    "admit_8192_cached_us",
    "take_100_us",
    "free_100_us",
    "hash_mtok_per_s",
    "bytes_per_cached_block",
    "awaited_rpcs_per_decode_step",
    "step_4096_running_16_growing_ratio",
]


def samples() -> Samples:
    """Returns what a run collects."""
    return {
        "step_256": [50e-6, 60e-6, 70e-6],
        "scan_256": [10e-6] * 3,
        "step_256_grpc": [400e-6] * 3,
        "occupied_256_grpc": [40e-6] * 3,
        "beside_step_256": [50e-6, 70e-6, 60e-6],
        "beside_scan_256": [10e-6] * 3,
        "step_4096": [160e-6, 175e-6, 190e-6],
        "scan_4096": [100e-6] * 3,
        "admit_8192_cold": [600e-6],
        "admit_8192_cached": [300e-6],
        "take_100": [5e-6],
        "free_100": [4e-6],
        "hash_8192": [8192 / 32e6],
        "bytes_per_cached_block": [150.0],
    }


def report(theirs: Samples | None = None) -> dict[str, object]:
    """Returns the document of these samples."""
    return build_report(
        samples(), theirs or {}, awaited=0.0, counts={}, environment={}, peer={"name": "peer"}
    ).document()


def test_the_names_of_the_figures_are_those_that_programs_read() -> None:
    """A renamed figure breaks whoever compares two releases."""
    assert list(FIGURES) == KEYS
    document = report()
    assert [key for key in document if key in KEYS] == KEYS
    assert json.loads(json.dumps(document)) == document


def test_medians_are_in_microseconds_and_rates_in_million_tokens() -> None:
    """A unit that is off by a thousand makes every claim wrong."""
    document = report()
    assert document["step_256_decodes_inprocess_us"] == pytest.approx(60)
    assert document["hash_mtok_per_s"] == pytest.approx(32)
    assert document["parts"]["scan_256_us"] == pytest.approx(10)  # type: ignore[index]


def test_the_ratio_for_many_sequences_leaves_out_the_scan_of_both() -> None:
    """Its note says so: cost must be shown to follow what changed, not who runs."""
    assert report()["step_4096_running_16_growing_ratio"] == pytest.approx(75 / 50)


def test_a_peer_is_compared_so_that_above_one_is_in_our_favour() -> None:
    """A rate and a time are compared the other way round."""
    document = report({"step_256": [1200e-6], "hash_8192": [8192 / 16e6], "take_100": [2.5e-6]})
    assert document["ratios"] == {
        "step_256_decodes_inprocess_us": 20.0,
        "take_100_us": 0.5,
        "hash_mtok_per_s": 2.0,
    }
    assert set(PEER_FIGURES) <= set(KEYS)
    assert "ratios" not in report()


def test_a_spread_is_the_first_and_the_last_tenth() -> None:
    """Otherwise one outlier makes a quiet run look noisy."""
    found = spread([float(value) for value in range(11)])
    assert (found.low, found.high, found.count) == (1.0, 9.0, 11)
    assert spread([3.0]).low == spread([3.0]).high == median([3.0]) == 3.0


def test_rounds_are_merged_by_name() -> None:
    """Otherwise the last round is all that counts."""
    into: Samples = {"a": [1.0]}
    merge(into, {"a": [2.0], "b": [3.0]})
    assert into == {"a": [1.0, 2.0], "b": [3.0]}
