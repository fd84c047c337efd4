"""What keys and values are divided by in a float8 cache: from the checkpoint, from the first prompt, or 1."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
import torch

from execsvc import loading
from execsvc.config import ExecsvcConfig
from execsvc.gpu.kv_scales import KVScales
from execsvc.model.llama import load_kv_scales
from execsvc.model.source import open_model
from quire.errors import ConfigError, ModelFormatError
from tests.unit.execsvc import tiny
from tests.unit.execsvc.recorded_graphs import RecordingRuntime
from tests.unit.execsvc.tiny import Driver, start

SMALL = dataclasses.replace(tiny.CONFIG, num_layers=2)


def _scales(directory: Path, tensors: dict[str, torch.Tensor]) -> Any:
    """Returns the scales of a checkpoint with these tensors more, named after the layer."""
    tiny.write_directory(directory, SMALL)
    path = directory / "model.safetensors"
    extra = {f"model.layers.{name}": tensor for name, tensor in tensors.items()}
    save_file(load_file(path) | extra, path)
    source = open_model(str(directory))
    try:
        return load_kv_scales(source)
    finally:
        source.close()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("self_attn.k_scale", "self_attn.v_scale"),
        ("self_attn.attn.k_scale", "self_attn.attn.v_scale"),
        ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),
        ("self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale"),
    ],
)
def test_scales_of_a_checkpoint_are_found_by_every_name(tmp_path: Path, key: str, value: str) -> None:
    """A scale that is overlooked makes every answer slightly wrong, without an error."""
    found = _scales(tmp_path, {f"0.{key}": torch.tensor(0.5), f"1.{value}": torch.tensor([0.25])})
    assert found == ((0.5, 1.0), (1.0, 0.25))


def test_one_scale_may_stand_for_both(tmp_path: Path) -> None:
    """Older checkpoints have `kv_scale`; most have none."""
    assert _scales(tmp_path / "none", {}) is None
    assert _scales(tmp_path / "both", {"1.self_attn.kv_scale": torch.tensor(0.125)}) == ((1.0, 1.0), (0.125, 0.125))


@pytest.mark.parametrize("wrong", [torch.tensor(0.0), torch.tensor(float("nan")), torch.tensor([1.0, 2.0])])
def test_a_scale_that_is_none_is_refused(tmp_path: Path, wrong: torch.Tensor) -> None:
    """Division by it would fill the cache with infinities."""
    with pytest.raises(ModelFormatError, match=r"self_attn\.k_scale"):
        _scales(tmp_path, {"0.self_attn.k_scale": wrong})


def test_the_largest_number_decides_and_nothing_decides_nothing() -> None:
    """Keys of a first prompt that say nothing must not leave a scale of 0 or NaN."""
    scales = KVScales(2)
    scales.measure(0, torch.tensor([3.0, -400.0]), torch.tensor([50.0]))
    scales.measure(1, torch.zeros(3), torch.tensor([float("nan")]))
    assert scales.pairs == [(2.0, 0.5), (1.0, 1.0)]
    scales.finish()
    assert scales.described() == {
        "origin": "first prompt", "k_scale_min": 1.0, "k_scale_max": 2.0, "v_scale_min": 0.5, "v_scale_max": 1.0
    }  # fmt: skip


def test_the_first_prompt_decides_for_all_that_follow() -> None:
    """Graphs that still divided by 1 would read what was divided by something else."""
    prompt = [(7 * i) % 311 for i in range(20)]
    drivers = []
    for calculated in (False, True):
        engine = tiny.gpu_engine_of(SMALL, runtime=RecordingRuntime(), sizes=[1, 2])
        if calculated:
            engine.calculate_kv_scales()
        driver = Driver(engine)
        driver.run({1: 20}, added=[start(1, prompt, [1, 2])])
        driver.run({1: 1, 2: 9}, added=[start(2, prompt[:9], [3])])
        for _ in range(4):
            driver.run({1: 1, 2: 1})
        drivers.append(driver)
    steps: Any = drivers[1].engine._steps
    scales = steps._decoder.operations.scales
    assert scales.origin == "first prompt"
    assert all(pair != (1.0, 1.0) for pair in scales.pairs)
    assert drivers[0].tokens == drivers[1].tokens
    plain, divided = (driver.engine._cache.data[1:4] for driver in drivers)
    for layer, pair in enumerate(scales.pairs):
        for part, scale in enumerate(pair):
            assert torch.allclose(plain[:, layer, part], divided[:, layer, part] * scale, atol=1e-4)


def test_scales_are_for_float8_caches_alone() -> None:
    """A flag that does nothing would be believed."""
    for kv_cache_dtype in ("auto", "int8_per_token_head"):
        config = ExecsvcConfig(calculate_kv_scales=True, device="cpu", kv_cache_dtype=kv_cache_dtype)
        with pytest.raises(ConfigError, match=f"calculate_kv_scales: found with kv_cache_dtype {kv_cache_dtype}"):
            loading._choose_kv_dtype(config, torch.bfloat16, torch.device("cpu"), None)
