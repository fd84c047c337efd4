"""What a decoder of the Llama family is made of, read from config.json or from GGUF metadata.

Whatever a model asks for that is not computed here is refused by name: an answer that is silently wrong is worse than
none.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from quire.errors import ModelFormatError, UnsupportedError

_HF_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_GGUF_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
SUPPORTED = "Llama, SmolLM, Mistral, Qwen2 and Qwen3"


@dataclasses.dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding: inverse frequencies theta^(-2i/d), scaled."""

    theta: float
    """Base of the frequencies."""
    kind: str = "default"
    """"default", "linear" or "llama3"."""
    factor: float = 1.0
    """linear: positions are divided by it. llama3: low frequencies are."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths longer than original / this are fully scaled."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths shorter than original / this are not scaled."""
    original_max_position: int = 8192
    """llama3: context length of the first training."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelConfig:
    """Geometry of a decoder. Names follow Hugging Face configs."""

    architecture: str
    """"LlamaForCausalLM", ..."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    """Longest sequence in tokens."""
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    """Whether the attention's output projection has a bias."""
    qk_norm: bool = False
    """Whether each head of q and k is normalised before the rotation (Qwen3)."""
    sliding_window: int = 0
    """Positions that a query sees, its own included; 0 for all."""
    dtype: str = "float32"
    """Element type the weights were published in."""

    def __post_init__(self) -> None:
        """Checks that the numbers fit together.

        Raises:
            ModelFormatError: one does not.
        """
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            value = getattr(self, name)
            if not 1 <= value <= 2**31 - 1:
                raise ModelFormatError(f"{name}: {value} is out of range, at least 1 is needed", field=name)
        if self.num_heads % self.num_kv_heads:
            raise ModelFormatError(
                f"num_heads: {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}", field="num_heads"
            )
        if self.head_dim < 2 or self.head_dim % 2:  # noqa: PLR2004 - rotary embedding turns pairs
            raise ModelFormatError(f"head_dim: {self.head_dim} is not an even number", field="head_dim")
        if self.max_position_embeddings < 1:
            raise ModelFormatError(
                f"max_position_embeddings: {self.max_position_embeddings}, at least 1 is needed",
                field="max_position_embeddings",
            )


class _Fields:
    """Typed access to a mapping read from a file; every message names the field and the file."""

    def __init__(self, values: Mapping[str, Any], origin: str) -> None:
        self._values = values
        self._origin = origin

    def get(self, name: str, default: Any = None) -> Any:
        """Returns the value, or the default if it is missing or null."""
        value = self._values.get(name)
        return default if value is None else value

    def integer(self, name: str, default: int | None = None) -> int:
        """Returns a whole number.

        Raises:
            ModelFormatError: it is missing without default, or no whole number.
        """
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            found = "missing" if value is None else repr(value)
            raise ModelFormatError(f"{self._origin}: {name} is {found}, a whole number is needed", field=name)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Returns a number; raises as `integer`."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            found = "missing" if value is None else repr(value)
            raise ModelFormatError(f"{self._origin}: {name} is {found}, a number is needed", field=name)
        return float(value)

    def refuse(self, name: str, wanted: object, why: str) -> None:
        """Raises UnsupportedError if the field is there and is not `wanted`."""
        value = self.get(name, wanted)
        if value != wanted:
            raise UnsupportedError(f"{self._origin}: {name} = {value!r} is not supported: {why}", field=name)


def _refuse_architecture(found: object, origin: str) -> UnsupportedError:
    return UnsupportedError(
        f"{origin}: architecture {found!r} is not supported; supported are {SUPPORTED}", field="architecture"
    )


def _hf_rope(fields: _Fields, origin: str) -> RopeConfig:
    """Returns the rotary settings of a config.json, in the old spelling (rope_scaling) or the new (rope_parameters)."""
    parameters = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise ModelFormatError(f"{origin}: rope_scaling is {parameters!r}, an object is needed", field="rope_scaling")
    inner = _Fields(parameters, f"{origin}, rope_scaling")
    theta = inner.number("rope_theta", fields.number("rope_theta", 10_000.0))
    kind = inner.get("rope_type", inner.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, kind, factor=inner.number("factor"))
    if kind == "llama3":
        return RopeConfig(
            theta,
            kind,
            factor=inner.number("factor"),
            low_freq_factor=inner.number("low_freq_factor"),
            high_freq_factor=inner.number("high_freq_factor"),
            original_max_position=inner.integer("original_max_position_embeddings"),
        )
    raise UnsupportedError(
        f"{origin}: rope scaling {kind!r} is not supported; supported are linear and llama3", field="rope_scaling"
    )


def _hf_window(fields: _Fields, family: str, num_layers: int, origin: str) -> int:
    """Returns the sliding window of a config.json, 0 for none; refuses one that only some layers have."""
    window = fields.get("sliding_window", 0)
    layer_types = fields.get("layer_types", [])
    if family.startswith("qwen") and not fields.get("use_sliding_window", False):
        return 0
    if not window or (layer_types and "sliding_attention" not in layer_types):
        return 0
    if family == "llama":
        return 0
    full_layers = "full_attention" in layer_types
    if family.startswith("qwen") and not layer_types:
        full_layers = fields.integer("max_window_layers", num_layers) > 0
    if full_layers:
        raise UnsupportedError(
            f"{origin}: sliding_window on some layers only is not supported; on all layers it is",
            field="sliding_window",
        )
    return fields.integer("sliding_window")


def from_hf(values: Mapping[str, Any], origin: str) -> ModelConfig:
    """Returns the configuration in a parsed config.json.

    Args:
        values: the parsed file.
        origin: its path, for messages.

    Raises:
        ModelFormatError: a field is missing or makes no sense.
        UnsupportedError: an architecture or a feature that is not computed here.
    """
    fields = _Fields(values, origin)
    names = fields.get("architectures", [])
    name = names[0] if isinstance(names, list) and names else fields.get("model_type", "unknown")
    if name not in _HF_ARCHITECTURES:
        raise _refuse_architecture(name, origin)
    family = _HF_ARCHITECTURES[name]
    fields.refuse("hidden_act", "silu", "the activation must be silu")
    fields.refuse("mlp_bias", wanted=False, why="projections of the MLP must have no bias")
    fields.refuse("partial_rotary_factor", 1.0, "the rotation must cover the whole head")
    if fields.get("quantization_config") is not None:
        kind = fields.get("quantization_config", {}).get("quant_method", "unknown")
        raise UnsupportedError(f"{origin}: quantization {kind!r} is not supported", field="quantization_config")
    num_layers, num_heads = fields.integer("num_hidden_layers"), fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    attention_bias = bool(fields.get("attention_bias", False))
    return ModelConfig(
        architecture=name,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=fields.integer("head_dim", hidden_size // max(num_heads, 1)),
        max_position_embeddings=fields.integer("max_position_embeddings", 2048),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=_hf_rope(fields, origin),
        tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or attention_bias,
        output_bias=attention_bias and family in {"llama", "qwen3"},
        qk_norm=family == "qwen3",
        sliding_window=_hf_window(fields, family, num_layers, origin),
        dtype=str(fields.get("dtype", fields.get("torch_dtype", "float32"))),
    )


def from_gguf(metadata: Mapping[str, Any], tensor_names: frozenset[str], origin: str) -> ModelConfig:
    """Returns the configuration in the metadata of a GGUF file.

    Args:
        metadata: key to value.
        tensor_names: names of the tensors in the file.
        origin: its path, for messages.

    Raises:
        ModelFormatError: a key is missing or makes no sense.
        UnsupportedError: an architecture or a feature that is not computed here.
    """
    architecture = metadata.get("general.architecture", "unknown")
    if architecture not in _GGUF_ARCHITECTURES:
        raise _refuse_architecture(architecture, origin)
    prefix = f"{architecture}."
    fields = _Fields({key.removeprefix(prefix): value for key, value in metadata.items()}, origin)
    if fields.get("expert_count", 0):
        raise UnsupportedError(f"{origin}: mixture of experts is not supported", field="expert_count")
    kind = fields.get("rope.scaling.type", "none")
    if kind not in {"none", "linear"}:
        raise UnsupportedError(
            f"{origin}: rope scaling {kind!r} is not supported; supported are linear and llama3", field="rope_scaling"
        )
    num_heads, hidden_size = fields.integer("attention.head_count"), fields.integer("embedding_length")
    head_dim = fields.integer("attention.key_length", hidden_size // max(num_heads, 1))
    for name in ("rope.dimension_count", "attention.value_length"):
        fields.refuse(name, head_dim, "it must be the size of a head")
    theta = fields.number("rope.freq_base", 10_000.0)
    factor = fields.number("rope.scaling.factor", 1.0)
    return ModelConfig(
        architecture=_GGUF_ARCHITECTURES[architecture],
        vocab_size=len(metadata.get("tokenizer.ggml.tokens", ())) or fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("feed_forward_length"),
        num_layers=fields.integer("block_count"),
        num_heads=num_heads,
        num_kv_heads=fields.integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_position_embeddings=fields.integer("context_length"),
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        rope=RopeConfig(theta, "linear", factor=factor) if kind == "linear" else RopeConfig(theta),
        tie_word_embeddings="output.weight" not in tensor_names,
        qkv_bias="blk.0.attn_q.bias" in tensor_names,
        output_bias="blk.0.attn_output.bias" in tensor_names,
        qk_norm="blk.0.attn_q_norm.weight" in tensor_names,
        sliding_window=fields.integer("attention.sliding_window", 0),
    )
