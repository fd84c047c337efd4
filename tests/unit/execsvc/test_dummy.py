"""Dummy weights: the shapes of a real model, nothing of its knowledge."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from execsvc.config import ExecsvcConfig
from execsvc.executor import Executor
from execsvc.loading import load
from execsvc.model import llama
from execsvc.model.dummy import open_dummy, shape_of
from execsvc.warmup import run_step
from protos.execsvc.v1 import execsvc_pb2 as pb
from quire.errors import ModelFormatError, UnsupportedError
from tests.unit.execsvc import tiny

EIGHT_BILLION = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}


def test_an_8b_shape_has_the_weights_of_the_model_it_stands_for(tmp_path: Path) -> None:
    """Otherwise a measurement would be of something else. Shapes alone: 16 GB are not at hand."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(EIGHT_BILLION))
    source = open_dummy(str(path), 0, torch.device("cpu"), torch.bfloat16)
    names = tiny.tensor_names(source.config)
    total = sum(math.prod(shape_of(source.config, name)) for name in names)
    assert total == 8_030_261_248
    assert source.tokenizer is None


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    """Otherwise two runs could not be compared."""
    path = tmp_path / "shape.json"
    path.write_text(json.dumps(tiny.hf_config(tiny.CONFIG)))
    sources = [open_dummy(str(path), seed, torch.device("cpu"), torch.float32) for seed in (1, 1, 2)]
    name = "model.layers.0.mlp.up_proj.weight"
    first, again, other = (source.load(name) for source in sources)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert sources[0].name == "shape"
    model = llama.load(sources[0], torch.float32, torch.device("cpu"), 64)
    hidden = model.hidden(torch.tensor([3]), torch.tensor([0]), lambda _layer, q, _k, _v: q)
    assert torch.isfinite(model.logits(hidden)).all()


async def test_a_bare_configuration_runs_and_says_what_it_cannot(tmp_path: Path) -> None:
    """Steps run; text is refused with the reason, since there is nothing that could make tokens of it."""
    (tmp_path / "config.json").write_text(json.dumps(tiny.hf_config(dataclasses.replace(tiny.CONFIG, num_layers=1))))
    config = ExecsvcConfig(
        model=str(tmp_path), load_format="dummy", dtype="float32", kv_cache_tokens=2048, num_threads=1
    )
    loaded = load(config)
    run_step(loaded.engine, 20, 2, 16)
    executor = Executor(config, lambda _: None)
    try:
        executor.become_ready(loaded)
        assert executor.describe().model == pb.ModelInfo(
            name=tmp_path.name,
            architecture="LlamaForCausalLM",
            vocab_size=320,
            max_model_len=1024,
            parameter_count=loaded.parameter_count,
            dtype="float32",
        )
        with pytest.raises(UnsupportedError, match="no tokenizer"):
            executor.tokenizer()
    finally:
        await executor.close()


def test_a_tokenizer_beside_the_configuration_is_used(tmp_path: Path) -> None:
    """With one, dummies serve text like any model."""
    tiny.write_directory(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    source = open_dummy(str(tmp_path), 0, torch.device("cpu"), torch.float32)
    assert source.tokenizer is not None
    with pytest.raises(ModelFormatError, match=r"need a config\.json"):
        open_dummy(str(tmp_path / "nothing"), 0, torch.device("cpu"), torch.float32)
