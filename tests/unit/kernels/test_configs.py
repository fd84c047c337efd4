"""Launch tables: which entry counts, and what becomes of a table that is none."""

from __future__ import annotations

from collections.abc import Iterator
import json
from pathlib import Path

import pytest
import torch

from kernels import configs


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder of tables instead of the real one."""
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    monkeypatch.setattr(configs, "device_table_name", lambda _: "nvidia-x1")
    monkeypatch.setattr(configs, "forget", lambda: (configs._table.cache_clear(), configs._lookup.cache_clear()))
    configs.forget()
    yield tmp_path
    configs.forget()


def _write(folder: Path, name: str, table: object) -> None:
    (folder / f"{name}.json").write_text(json.dumps(table))


DEFAULTS = {
    "norm": [
        {"when": {"size": {"at_most": 64}}, "use": {"num_warps": 1}},
        {"when": {"dtype": "float32", "size": {"at_least": 4096}}, "use": {"num_warps": 16}},
        {"when": {}, "use": {"num_warps": 4}},
    ]
}


@pytest.mark.parametrize(
    ("size", "dtype", "warps"),
    [(64, "float32", 1), (65, "float32", 4), (4096, "float32", 16), (4096, "bfloat16", 4)],
)
def test_the_first_entry_that_fits_counts(folder: Path, size: int, dtype: str, warps: int) -> None:
    """Otherwise a launch would run with what was measured for another shape."""
    _write(folder, "default", DEFAULTS)
    assert configs.lookup("norm", torch.device("cpu"), size=size, dtype=dtype)["num_warps"] == warps


def test_a_device_table_comes_before_the_defaults(folder: Path) -> None:
    """What was measured on this device is better than what fits all; what it does not say falls back."""
    _write(folder, "default", DEFAULTS)
    _write(folder, "nvidia-x1", {"norm": [{"when": {"size": 128}, "use": {"num_warps": 2}}]})
    assert configs.lookup("norm", torch.device("cpu"), size=128, dtype="float32")["num_warps"] == 2
    assert configs.lookup("norm", torch.device("cpu"), size=129, dtype="float32")["num_warps"] == 4
    with pytest.raises(LookupError, match="no entry of 'gate' fits"):
        configs.lookup("gate", torch.device("cpu"))


@pytest.mark.parametrize(
    "table",
    [
        [],
        {"norm": {}},
        {"norm": [{"when": {}}]},
        {"norm": [{"when": {}, "use": {"num_warps": "four"}}]},
        {"norm": [{"when": {"size": {"below": 3}}, "use": {}}]},
    ],
)
def test_a_table_that_is_none_is_refused(folder: Path, table: object) -> None:
    """A mistake in an edited table must be named, not ignored."""
    _write(folder, "nvidia-x1", table)
    with pytest.raises(ValueError, match=r"nvidia-x1\.json"):
        configs.lookup("norm", torch.device("cpu"))


def test_every_committed_table_is_one() -> None:
    """A table that cannot be read would fail the first launch on that device."""
    paths = sorted(configs.FOLDER.glob("*.json"))
    assert [path.stem for path in paths if path.stem == configs.DEFAULT]
    for path in paths:
        table = configs.check_table(json.loads(path.read_text()), path.name)
        if path.stem == configs.DEFAULT:
            assert all(entries[-1]["when"] == {} for entries in table.values()), "the last default fits every launch"


def test_names_of_devices_become_names_of_files() -> None:
    """Otherwise a device would never find its table."""
    assert configs.table_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert configs.device_table_name(torch.device("cpu")) == "default"
