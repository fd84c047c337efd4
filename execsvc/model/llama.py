"""The decoder of the Llama family: Llama, SmolLM, Mistral, Qwen2, Qwen3."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import math

import torch
from torch.nn import functional

from execsvc.model.config import ModelConfig
from execsvc.model.layers import PackedLinear, Projection, RMSNorm, Rotary, inverse_frequencies, project, rotate
from execsvc.model.source import ModelSource
from quire.errors import ModelFormatError

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, q `[row, head, dim]`, k, v `[row, kv_head, dim]`) -> `[row, head, dim]`: writes k and v, then attends."""


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one layer."""

    input_norm: RMSNorm
    qkv: Projection
    """Query, key and value projections, stacked: one product instead of three."""
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    output: Projection
    mlp_norm: RMSNorm
    gate_up: Projection
    """Gate and up projections, stacked."""
    down: Projection


@dataclasses.dataclass(frozen=True, slots=True)
class Llama:
    """A decoder, ready to run."""

    config: ModelConfig
    embeddings: torch.Tensor
    """`[vocab_size, hidden_size]`."""
    layers: tuple[Layer, ...]
    final_norm: RMSNorm
    head: Projection
    """`[vocab_size, hidden_size]`; equal to the embeddings where they are tied."""
    rotary: Rotary
    kv_scales: tuple[tuple[float, float], ...] | None = None
    """What the checkpoint wants each layer's keys and values divided by in a float8 cache; None if it does not say."""

    @property
    def parameter_count(self) -> int:
        """Number of weights; tied ones once."""
        count = self.embeddings.numel() + self.final_norm.weight.numel()
        count += 0 if self.config.tie_word_embeddings else self.head.parameter_count
        for layer in self.layers:
            projections = (layer.qkv, layer.output, layer.gate_up, layer.down)
            count += sum(projection.parameter_count for projection in projections)
            norms = (layer.input_norm, layer.mlp_norm, layer.q_norm, layer.k_norm)
            count += sum(norm.weight.numel() for norm in norms if norm is not None)
        return count

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights on the device. Tied embeddings are there twice where the head is packed."""
        repacked = self.config.tie_word_embeddings and isinstance(self.head, PackedLinear)
        count = self.parameter_count + (self.head.parameter_count if repacked else 0)
        return count * self.embeddings.element_size()

    def hidden(self, tokens: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Returns the residual stream after the last layer, `[row, hidden_size]`.

        Args:
            tokens: `[row]` int64.
            positions: `[row]` int64.
            attend: computes attention; it may leave padding rows unspecified.
        """
        config = self.config
        cosines, sines = self.rotary.at(positions)
        stream = functional.embedding(tokens, self.embeddings)
        rotated_count = config.num_heads + config.num_kv_heads
        for index, layer in enumerate(self.layers):
            heads = layer.qkv(layer.input_norm(stream)).view(len(tokens), -1, config.head_dim)
            q, k = heads[:, : config.num_heads], heads[:, config.num_heads : rotated_count]
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = layer.q_norm(q), layer.k_norm(k)
                q, k = rotate(q, cosines, sines), rotate(k, cosines, sines)
            else:
                both = rotate(heads[:, :rotated_count], cosines, sines)
                q, k = both[:, : config.num_heads], both[:, config.num_heads :]
            mixed = attend(index, q, k, heads[:, rotated_count:])
            stream = stream + layer.output(mixed.reshape(len(tokens), -1))
            gate_up = layer.gate_up(layer.mlp_norm(stream))
            gate, up = gate_up[:, : config.intermediate_size], gate_up[:, config.intermediate_size :]
            stream = stream + layer.down(functional.silu(gate) * up)
        return stream

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns `[row, vocab_size]` for rows of the residual stream."""
        return self.head(self.final_norm(rows))


def load(
    source: ModelSource,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
    progress: Callable[[float], None] = lambda _: None,
) -> Llama:
    """Returns the decoder with the weights of `source`.

    Args:
        source: where the weights are.
        dtype: to compute in.
        device: to compute on.
        max_model_len: positions to prepare for, in tokens.
        progress: told the share that is loaded, 0 .. 1.

    Raises:
        ModelFormatError: a tensor is missing or has another shape than the configuration says.
    """
    config = source.config

    def get(name: str, *shape: int) -> torch.Tensor:
        return fetch(source, name, shape).to(device=device, dtype=dtype)

    embeddings = get("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    layers = []
    for index in range(config.num_layers):
        progress((index + 1) / (config.num_layers + 2))
        layers.append(_load_layer(config, get, f"model.layers.{index}."))
    if config.tie_word_embeddings:
        head = project(embeddings)
    else:
        head = project(get("lm_head.weight", config.vocab_size, config.hidden_size))
    final_norm = RMSNorm(get("model.norm.weight", config.hidden_size), config.rms_norm_eps)
    frequencies = inverse_frequencies(config.rope, config.head_dim, source.rope_factors())
    rotary = Rotary.build(frequencies, max_model_len, device)
    progress(1.0)
    return Llama(config, embeddings, tuple(layers), final_norm, head, rotary, load_kv_scales(source))


def fetch(source: ModelSource, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Returns a tensor of `source`; raises ModelFormatError if it is missing or has another shape."""
    tensor = source.load(name)
    if tuple(tensor.shape) != shape:
        raise ModelFormatError(
            f"{source.path}: tensor {name!r} has shape {list(tensor.shape)}, the configuration says {list(shape)}"
        )
    return tensor


def load_kv_scales(source: ModelSource) -> tuple[tuple[float, float], ...] | None:
    """Returns (key scale, value scale) of each layer by the names that vLLM knows; 1 where a layer has none.

    Returns None if no layer has any.

    Raises:
        ModelFormatError: a scale is not one positive number.
    """

    def find(layer: int, name: str) -> float | None:
        for suffix in (f"attn.{name}_scale", f"{name}_scale", f"{name}_proj.{name}_scale", f"{name}_proj.output_scale",
                       "kv_scale"):  # fmt: skip
            tensor_name = f"model.layers.{layer}.self_attn.{suffix}"
            tensor = source.find(tensor_name)
            if tensor is None:
                continue
            scale = float(tensor) if tensor.numel() == 1 else math.nan
            if not (math.isfinite(scale) and scale > 0.0):
                raise ModelFormatError(
                    f"{source.path}: tensor {tensor_name!r}: one positive number expected, found {tensor.tolist()}"
                )
            return scale
        return None

    found = [(find(layer, "k"), find(layer, "v")) for layer in range(source.config.num_layers)]
    if not any(scale for pair in found for scale in pair):
        return None
    return tuple((key or 1.0, value or 1.0) for key, value in found)


def _load_layer(config: ModelConfig, get: Callable[..., torch.Tensor], prefix: str) -> Layer:
    """Returns one layer's weights, the stacked projections put together; `get` takes a name and a shape."""
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    projections = (("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size))
    hidden, inner, eps = config.hidden_size, config.intermediate_size, config.rms_norm_eps

    def norm(name: str, size: int) -> RMSNorm:
        return RMSNorm(get(f"{prefix}{name}.weight", size), eps)

    qkv = torch.cat([get(f"{prefix}self_attn.{name}.weight", size, hidden) for name, size in projections])
    qkv_bias = (
        torch.cat([get(f"{prefix}self_attn.{name}.bias", size) for name, size in projections])
        if config.qkv_bias
        else None
    )
    output_bias = get(f"{prefix}self_attn.o_proj.bias", hidden) if config.output_bias else None
    gate_up = torch.cat([get(f"{prefix}mlp.{name}.weight", inner, hidden) for name in ("gate_proj", "up_proj")])
    return Layer(
        input_norm=norm("input_layernorm", hidden),
        qkv=project(qkv, qkv_bias),
        q_norm=norm("self_attn.q_norm", config.head_dim) if config.qk_norm else None,
        k_norm=norm("self_attn.k_norm", config.head_dim) if config.qk_norm else None,
        output=project(get(f"{prefix}self_attn.o_proj.weight", hidden, q_size), output_bias),
        mlp_norm=norm("post_attention_layernorm", hidden),
        gate_up=project(gate_up),
        down=project(get(f"{prefix}mlp.down_proj.weight", hidden, inner)),
    )
