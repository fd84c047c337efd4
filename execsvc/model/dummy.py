"""Random weights of any configuration, made where they are needed: for measuring a model whose weights are not there.

The same seed gives the same weights on the same kind of device.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from pathlib import Path
from typing import Any
import zlib

import torch

from execsvc.model import config as model_config
from execsvc.model import tokenizer as model_tokenizer
from execsvc.model.config import ModelConfig
from execsvc.model.source import PACKAGED, open_model, read_json
from execsvc.model.tokenizer import TokenizerFiles
from quire.errors import ModelFormatError


@dataclasses.dataclass(slots=True)
class DummySource:
    """A configuration that stands for a model. Implements `execsvc.model.source.ModelSource`."""

    path: Path
    name: str
    config: ModelConfig
    tokenizer: TokenizerFiles | None
    """None where there is none beside the configuration."""
    seed: int
    device: torch.device
    dtype: torch.dtype

    def load(self, name: str) -> torch.Tensor:
        """Returns a random tensor of the shape that the configuration says: norms of one, the rest keeps scale."""
        shape = shape_of(self.config, name)
        if "norm" in name:
            return torch.ones(shape, dtype=self.dtype, device=self.device)
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        tensor = torch.empty(shape, dtype=self.dtype, device=self.device)
        return tensor.normal_(0.0, shape[-1] ** -0.5, generator=generator)

    def find(self, name: str) -> torch.Tensor | None:  # noqa: ARG002 - the protocol's name
        """Returns None: the configuration says what there is."""
        return None

    def rope_factors(self) -> torch.Tensor | None:
        """Returns None: the configuration says it all."""
        return None

    def generation(self) -> Mapping[str, Any]:
        """Returns nothing: random weights have no favourite."""
        return {}

    def close(self) -> None:
        """Does nothing."""


def open_dummy(model: str, seed: int, device: torch.device, dtype: torch.dtype) -> DummySource:
    """Returns random weights for a config.json, a directory with one, or a model that could be loaded.

    Args:
        model: path of a config.json, a directory, a GGUF file, or the packaged model's name.
        seed: of the weights, 0 .. 2^31 - 1.
        device: where the weights are made.
        dtype: of the weights.

    Raises:
        ModelFormatError: nothing there, or it says no configuration.
        UnsupportedError: a model that cannot be computed here.
    """
    path = Path(model).expanduser()
    if model == PACKAGED or path.suffix == ".gguf":
        source = open_model(model)
        source.close()
        return DummySource(source.path, source.name, source.config, source.tokenizer, seed, device, dtype)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ModelFormatError(f"{file}: no such file; dummy weights need a config.json", field="model")
    config = model_config.from_hf(read_json(file), str(file))
    directory = file.parent
    has_tokenizer = (directory / "tokenizer.json").is_file()
    tokenizer = model_tokenizer.from_directory(directory, config.vocab_size) if has_tokenizer else None
    name = directory.resolve().name if file.name == "config.json" else file.stem
    return DummySource(file, name, config, tokenizer, seed, device, dtype)


def shape_of(config: ModelConfig, name: str) -> tuple[int, ...]:
    """Returns the shape of a tensor by its Hugging Face name."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    matrices = {
        "embed_tokens": (config.vocab_size, hidden),
        "lm_head": (config.vocab_size, hidden),
        "q_proj": (q, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, q),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    module, kind = name.split(".")[-2:]
    if module in {"q_norm", "k_norm"}:
        return (config.head_dim,)
    if "norm" in module:
        return (hidden,)
    return matrices[module][:1] if kind == "bias" else matrices[module]
