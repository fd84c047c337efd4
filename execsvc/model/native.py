"""The decoder of the Llama family on the compiled CPU step: weights in bfloat16, or in 4 or 8 bits."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Final

import torch

from execsvc.model import llama
from execsvc.model.config import ModelConfig
from execsvc.model.few_bits import quantise
from execsvc.model.layers import Rotary, inverse_frequencies
from execsvc.model.source import ModelSource
from kernels.cpu import library, panels
from kernels.cpu.decoder import Decoder, DecoderWeights, Geometry, LayerWeights
from kernels.cpu.library import Variant
from kernels.cpu.panels import Matrix, Quantised

_LAST_BITS: Final = 8
"""Of embeddings and head: what these lose shows most in the logits, and files in 4 bits keep more for them, too."""


@dataclasses.dataclass(frozen=True, slots=True)
class NativeModel:
    """A decoder, ready to run."""

    config: ModelConfig
    decoder: Decoder
    parameter_count: int
    """Number of weights; tied ones once."""
    weight_bytes: int
    """Bytes of the weights. Tied embeddings in bfloat16 are there twice: as rows to look up, and as panels."""


def geometry_of(config: ModelConfig, block_size: int, kv_dtype: torch.dtype = torch.bfloat16) -> Geometry:
    """Returns the sizes of a model for the step on a cache of `kv_dtype`."""
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
        kv_dtype=kv_dtype,
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
    *,
    keep_bits: bool = True,
    bits: int | None = None,
    kv_dtype: torch.dtype = torch.bfloat16,
) -> NativeModel:
    """Returns the decoder with the weights of `source`, each packed as soon as it is read.

    Args:
        source: where the weights are.
        block_size: tokens of a KV block.
        max_model_len: positions to prepare for, in tokens.
        variant: from `choose_variant`.
        thread_count: threads that compute.
        progress: told the share that is loaded, 0 .. 1.
        keep_bits: whether matrices that the file has in 4 or 8 bits stay so; else they become bfloat16.
        bits: 4 or 8, to which matrices are rounded that the file has in more; embeddings and head to 8 at least. None
            leaves them in bfloat16, and so are those whose inputs are no whole groups.
        kv_dtype: element type of the cache that it will compute on, bfloat16 or `kernels.layout.INT8`.

    Raises:
        ModelFormatError: a tensor is missing or has another shape than the configuration says.
    """
    config = source.config
    packer = _Packer(source, keep_bits=keep_bits, bits=bits)
    layers = []
    for index in range(config.num_layers):
        progress((index + 1) / (config.num_layers + 2))
        layers.append(packer.layer(f"model.layers.{index}."))
    embedding, size = "model.embed_tokens.weight", config.vocab_size
    tied = config.tie_word_embeddings
    embeddings = packer.table(embedding, size)
    head = embeddings
    # Panels in few bits are looked up as well as multiplied; of bfloat16 there are rows and panels.
    if not tied or embeddings.format == panels.BF16:
        head = packer.matrix(
            [(embedding if tied else "lm_head.weight", size)], config.hidden_size, again=tied, last=True
        )
    frequencies = inverse_frequencies(config.rope, config.head_dim, source.rope_factors())
    rotary = Rotary.build(frequencies, max_model_len, torch.device("cpu"))
    weights = DecoderWeights(
        embeddings=embeddings,
        layers=tuple(layers),
        final_norm=packer.vector("model.norm.weight", config.hidden_size),
        head=head,
        cosines=rotary.cosines,
        sines=rotary.sines,
    )
    decoder = Decoder(geometry_of(config, block_size, kv_dtype), weights, variant, thread_count)
    progress(1.0)
    return NativeModel(config, decoder, packer.count, sum(tensor.nbytes for tensor in weights.tensors()))


class _Packer:
    """Reads weights and packs them."""

    def __init__(self, source: ModelSource, *, keep_bits: bool, bits: int | None) -> None:
        self._source = source
        self._bits = bits
        self._config = source.config
        # Only files that may have few bits offer this.
        self._quantised = getattr(source, "load_quantised", None) if keep_bits else None
        self.count = 0
        """Weights read so far."""

    def vector(self, name: str, size: int) -> torch.Tensor:
        """Returns a vector: they are few, and read in float32."""
        self.count += size
        return llama.fetch(self._source, name, (size,)).float()

    def table(self, name: str, size: int) -> Matrix:
        """Returns embeddings, `[size, hidden]`: rows of bfloat16, or panels in few bits."""
        hidden = self._config.hidden_size
        self.count += size * hidden
        small = self._in_few_bits([(name, size)], hidden)
        if small is not None:
            return panels.pack(small)
        rows = llama.fetch(self._source, name, (size, hidden))
        if self._bits and hidden % panels.GROUP == 0:
            return panels.pack(quantise(rows, _LAST_BITS))
        return Matrix(rows.bfloat16().contiguous(), panels.BF16)

    def matrix(
        self,
        parts: list[tuple[str, int]],
        inputs: int,
        order: torch.Tensor | None = None,
        *,
        again: bool = False,
        last: bool = False,
    ) -> Matrix:
        """Returns matrices (name, outputs) stacked and packed, in the file's own bits if all are alike.

        Args:
            parts: name and outputs of each.
            inputs: of all of them.
            order: of the stacked rows; None leaves them.
            again: whether they were counted already.
            last: whether what comes out are logits.
        """
        self.count += 0 if again else sum(rows for _, rows in parts) * inputs
        small = self._in_few_bits(parts, inputs)
        if small is not None:
            return panels.pack(small if order is None else small.rows(order))
        whole = torch.cat([llama.fetch(self._source, name, (rows, inputs)) for name, rows in parts])
        ordered = whole if order is None else whole[order]
        if self._bits and inputs % panels.GROUP == 0:
            return panels.pack(quantise(ordered, _LAST_BITS if last else self._bits))
        return panels.pack(ordered.bfloat16())

    def _in_few_bits(self, parts: list[tuple[str, int]], inputs: int) -> Quantised | None:
        """Returns matrices stacked, in the bits that the file has them in, if they have 4 or 8 and are all alike."""
        if self._quantised is None:
            return None
        found = []
        for name, rows in parts:
            one = self._quantised(name)
            # A wrong shape is refused where the matrix is read as a whole.
            if one is None or tuple(one.quants.shape) != (rows, inputs):
                return None
            found.append(one)
        return panels.stack(found)

    def layer(self, prefix: str) -> LayerWeights:
        """Returns one layer's weights."""
        config = self._config
        hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
        q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
        heads = [
            (f"{prefix}self_attn.{name}_proj", size)
            for name, size in zip("qkv", (q_size, kv_size, kv_size), strict=True)
        ]
        gate_up = [(f"{prefix}mlp.{name}_proj.weight", inner) for name in ("gate", "up")]
        output = f"{prefix}self_attn.o_proj"
        bias = torch.cat([self.vector(f"{name}.bias", size) for name, size in heads]) if config.qkv_bias else None
        return LayerWeights(
            qkv=self.matrix([(f"{name}.weight", size) for name, size in heads], hidden),
            output=self.matrix([(f"{output}.weight", hidden)], q_size),
            gate_up=self.matrix(gate_up, hidden, panels.woven(2 * inner)),
            down=self.matrix([(f"{prefix}mlp.down_proj.weight", hidden)], inner),
            input_norm=self.vector(f"{prefix}input_layernorm.weight", hidden),
            mlp_norm=self.vector(f"{prefix}post_attention_layernorm.weight", hidden),
            q_norm=self.vector(f"{prefix}self_attn.q_norm.weight", head_dim) if config.qk_norm else None,
            k_norm=self.vector(f"{prefix}self_attn.k_norm.weight", head_dim) if config.qk_norm else None,
            qkv_bias=None if bias is None else panels.pad_bias(bias),
            output_bias=panels.pad_bias(self.vector(f"{output}.bias", hidden)) if config.output_bias else None,
        )
