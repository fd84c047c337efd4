"""The decoder of the Llama family as the compiled CPU step computes it: bfloat16 weights, packed."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses

import torch

from execsvc.model import llama
from execsvc.model.config import ModelConfig
from execsvc.model.layers import Linear, Projection, Rotary, inverse_frequencies
from execsvc.model.source import ModelSource
from kernels.cpu import library, panels
from kernels.cpu.decoder import Decoder, DecoderWeights, Geometry, LayerWeights
from kernels.cpu.library import Variant


@dataclasses.dataclass(frozen=True, slots=True)
class NativeModel:
    """A decoder, ready to run."""

    config: ModelConfig
    decoder: Decoder
    parameter_count: int
    """Number of weights; tied ones once."""
    weight_bytes: int
    """Bytes of the weights. Tied embeddings are there twice: as rows to look up, and as panels."""


def geometry_of(config: ModelConfig, block_size: int) -> Geometry:
    """Returns the sizes of a model for the step."""
    return Geometry(
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab=config.vocab_size,
        block_size=block_size,
        window=config.sliding_window,
        eps=config.rms_norm_eps,
    )


def choose_variant(config: ModelConfig, block_size: int) -> tuple[Variant | None, str]:
    """Returns the variant of the compiled step for a model, or None and why torch has to compute it."""
    variant, reason = library.choose()
    misfit = geometry_of(config, block_size).misfit
    return (None, misfit) if variant is not None and misfit else (variant, reason)


def load(
    source: ModelSource,
    block_size: int,
    max_model_len: int,
    variant: Variant,
    thread_count: int,
    progress: Callable[[float], None] = lambda _: None,
) -> NativeModel:
    """Returns the decoder with the weights of `source`, each packed as soon as it is read.

    Args:
        source: where the weights are.
        block_size: tokens of a KV block.
        max_model_len: positions to prepare for, in tokens.
        variant: from `choose_variant`.
        thread_count: threads that compute.
        progress: told the share that is loaded, 0 .. 1.

    Raises:
        ModelFormatError: a tensor is missing or has another shape than the configuration says.
    """
    config = source.config
    count = 0

    def fetch(name: str, *shape: int) -> torch.Tensor:
        nonlocal count
        tensor = llama.fetch(source, name, shape)
        count += tensor.numel()
        # Vectors are few and read in float32; matrices are what bandwidth goes to.
        return tensor.float() if len(shape) == 1 else tensor.to(torch.bfloat16)

    embeddings = fetch("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    layers = []
    for index in range(config.num_layers):
        progress((index + 1) / (config.num_layers + 2))
        layers.append(_pack(llama.load_layer(config, fetch, f"model.layers.{index}.")))
    head = embeddings
    if not config.tie_word_embeddings:
        head = fetch("lm_head.weight", config.vocab_size, config.hidden_size)
    frequencies = inverse_frequencies(config.rope, config.head_dim, source.rope_factors())
    rotary = Rotary.build(frequencies, max_model_len, torch.device("cpu"))
    weights = DecoderWeights(
        embeddings=embeddings.contiguous(),
        layers=tuple(layers),
        final_norm=fetch("model.norm.weight", config.hidden_size),
        head=panels.pack(head),
        cosines=rotary.cosines,
        sines=rotary.sines,
    )
    decoder = Decoder(geometry_of(config, block_size), weights, variant, thread_count)
    progress(1.0)
    return NativeModel(config, decoder, count, sum(tensor.nbytes for tensor in weights.tensors()))


def _pack(layer: llama.Layer) -> LayerWeights:
    """Returns one layer's weights as the step reads them."""

    def matrix(projection: Projection) -> torch.Tensor:
        assert isinstance(projection, Linear), "bfloat16 is not packed for torch"
        return projection.weight

    def bias(projection: Projection) -> torch.Tensor | None:
        assert isinstance(projection, Linear), "bfloat16 is not packed for torch"
        return None if projection.bias is None else panels.pad_bias(projection.bias)

    return LayerWeights(
        qkv=panels.pack(matrix(layer.qkv)),
        output=panels.pack(matrix(layer.output)),
        gate_up=panels.pack_gate_up(matrix(layer.gate_up)),
        down=panels.pack(matrix(layer.down)),
        input_norm=layer.input_norm.weight,
        mlp_norm=layer.mlp_norm.weight,
        q_norm=None if layer.q_norm is None else layer.q_norm.weight,
        k_norm=None if layer.k_norm is None else layer.k_norm.weight,
        qkv_bias=bias(layer.qkv),
        output_bias=bias(layer.output),
    )
