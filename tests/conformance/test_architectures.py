"""Every architecture and option that is accepted, on tiny random weights, against transformers."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
import subprocess
from typing import Any

import pytest
import torch

from execsvc.model import llama
from execsvc.model.source import open_model
from tests.oracle.expected import ORACLE_PYTHON, ROOT, oracle_available
from tests.unit.execsvc import tiny
from tests.unit.execsvc.tiny import CONFIG, Driver, start

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.slow,
    pytest.mark.skipif(not oracle_available(), reason="no .venv-oracle: run scripts/setup_oracle.sh"),
]
IDS = [(7 * index) % 311 for index in range(90)]
TOLERANCE = 2e-4
"""Absolute, logits of about 3, float32 on both sides with another order of summation."""
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({}, {}),
    "llama-tied": ({"tie_word_embeddings": True}, {}),
    "llama-rope-llama3": ({}, {"rope_scaling": LLAMA3}),
    "llama-rope-linear": ({}, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "mistral-window": ({"architecture": "MistralForCausalLM"}, {"sliding_window": 32}),
    "qwen2": ({"architecture": "Qwen2ForCausalLM", "qkv_bias": True}, {"use_sliding_window": False}),
    "qwen3": ({"architecture": "Qwen3ForCausalLM", "qk_norm": True}, {"attention_bias": False}),
}
MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Writes a directory for each model."""
    root, found = tmp_path_factory.mktemp("models"), {}
    for name, (changes, extra) in MODELS.items():
        config = dataclasses.replace(CONFIG, hidden_size=192, **changes)
        found[name] = tiny.write_directory(root / name, config)
        values = {**tiny.hf_config(config), "model_type": MODEL_TYPES[config.architecture], **extra}
        (found[name] / "config.json").write_text(json.dumps(values))
    return found


@pytest.fixture(scope="module")
def reference(directories: dict[str, Path]) -> dict[str, torch.Tensor]:
    """Runs transformers on all of them in one process."""
    root = next(iter(directories.values())).parent
    ids, result = root / "ids.json", root / "result.json"
    ids.write_text(json.dumps(IDS))
    command = [ORACLE_PYTHON, ROOT / "tests" / "oracle" / "run_tiny.py", ids, result, *directories.values()]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=root, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    logits = json.loads(result.read_text())
    return {name: torch.tensor(logits[str(path)]) for name, path in directories.items()}


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_those_of_transformers(
    name: str, directories: dict[str, Path], reference: dict[str, torch.Tensor]
) -> None:
    """Otherwise a family that we say we serve would answer with something else than its authors' model."""
    source = open_model(str(directories[name]))
    model = llama.load(source, torch.float32, torch.device("cpu"), 256)
    driver = Driver(tiny.engine_of(model, blocks=12, max_model_len=256))
    driver.run({1: 50}, added=[start(1, IDS, list(range(1, 8)))])
    driver.run({1: 40})
    assert (driver.logits[1][0] - reference[name]).abs().max() < TOLERANCE
