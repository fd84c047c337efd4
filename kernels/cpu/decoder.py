"""A decoder of the Llama family on the compiled step."""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Final
import weakref

import numpy as np
import numpy.typing as npt
import torch

from kernels.checks import check_dtype, check_shape
from kernels.cpu import panels
from kernels.cpu.library import BatchArguments, LayerArguments, MatrixArguments, ModelArguments, Variant
from kernels.cpu.memory import advise_huge_pages
from kernels.cpu.panels import Matrix
from kernels.layout import INT8, slot_elements

HEAD_LIMIT: Final = 512
"""Largest head, in elements."""
GROUP_LIMIT: Final = 256
"""Most query heads of a key/value head."""
CACHE_FORMATS: Final = {torch.bfloat16: 0, INT8: 1}
"""`CacheFormat` of variant.h by element type of the cache."""


@dataclasses.dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of a decoder."""

    hidden: int
    inner: int
    """Elements between gate/up and down."""
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    block_size: int
    window: int
    """Positions that a query sees, its own included; 0 for all."""
    eps: float
    """Of the root mean square norms."""
    kv_dtype: torch.dtype = torch.bfloat16
    """Element type of the cache, one of CACHE_FORMATS."""

    @property
    def misfit(self) -> str:
        """Why the step cannot compute this; empty if it can."""
        sizes = (("hidden_size", self.hidden), ("intermediate_size", self.inner), ("head_dim", self.head_dim))
        for name, size in (*sizes, ("block_size", self.block_size)):
            if size % panels.LANE:
                return f"{name}: {size} is not a multiple of {panels.LANE}"
        if self.kv_dtype not in CACHE_FORMATS:
            return f"kv_dtype: {self.kv_dtype} is not one of {', '.join(map(str, CACHE_FORMATS))}"
        if self.head_dim > HEAD_LIMIT:
            return f"head_dim: {self.head_dim} is more than {HEAD_LIMIT}"
        if self.heads // self.kv_heads > GROUP_LIMIT:
            return f"num_heads: {self.heads} is more than {GROUP_LIMIT} for each of {self.kv_heads}"
        return ""


@dataclasses.dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer, packed. Vectors are float32."""

    qkv: Matrix
    output: Matrix
    gate_up: Matrix
    down: Matrix
    input_norm: torch.Tensor
    mlp_norm: torch.Tensor
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    qkv_bias: torch.Tensor | None = None
    output_bias: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        """Returns those that are there."""
        found = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return [part.panels if isinstance(part, Matrix) else part for part in found if part is not None]


@dataclasses.dataclass(frozen=True, slots=True)
class DecoderWeights:
    """A whole decoder, packed."""

    embeddings: Matrix
    """`[vocab, hidden]`: in bfloat16 not packed, but rows as they are; in few bits it may be the head."""
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
    head: Matrix
    """Of the embeddings where they are tied."""
    cosines: torch.Tensor
    """`[position, head_dim / 2]` float32."""
    sines: torch.Tensor
    """Like `cosines`."""

    def tensors(self) -> list[torch.Tensor]:
        """Returns all of them."""
        own = [self.final_norm, self.head.panels, self.cosines, self.sines]
        own += [] if self.embeddings is self.head else [self.embeddings.panels]
        return own + [tensor for layer in self.layers for tensor in layer.tensors()]


class Decoder:
    """A decoder, its threads and its scratch memory. Any number can live in one process.

    Args:
        geometry: sizes; `misfit` must be empty.
        weights: kept, not copied.
        variant: from `library.choose`.
        thread_count: threads that compute, the caller's included.

    Raises:
        ValueError: the geometry does not fit the step.
        MemoryError: no memory, or no threads.
    """

    def __init__(self, geometry: Geometry, weights: DecoderWeights, variant: Variant, thread_count: int) -> None:
        if geometry.misfit:
            raise ValueError(geometry.misfit)
        self.geometry = geometry
        self.weights = weights
        self.variant = variant
        self.thread_count = thread_count
        for tensor in weights.tensors():
            assert tensor.is_contiguous(), "the step reads plain memory"
            advise_huge_pages(tensor)
        arguments = _model_arguments(geometry, weights)
        self._step = variant.library.step
        self._runner = variant.library.open(ctypes.byref(arguments), variant.index, thread_count)
        if not self._runner:
            message = f"the CPU step found no memory or no threads ({thread_count} were asked for)"
            raise MemoryError(message)
        self.close = weakref.finalize(self, variant.library.close, self._runner)
        """Ends the threads and gives the memory back; nothing may be computed afterwards."""
        self._stride = -(-geometry.vocab // panels.PAIR) * panels.PAIR

    def step(
        self,
        cache: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        block_tables: npt.NDArray[np.int32],
        context_lens: npt.NDArray[np.int64],
        query_starts: npt.NDArray[np.int64],
        sampled_rows: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes one batch. Writes `cache`.

        Args:
            cache: `[block, layer, 2, kv_head, block_size, head_dim]` of the geometry's `kv_dtype`, each head of a block
                as panels; with int8 the last axis has 4 elements more, the bytes of a scale (`kernels.cpu.panels`).
            tokens: `[token or more]` int64, below the vocabulary.
            positions: like `tokens`, below the rows of the cosines.
            slots: `[token]` int64, block * block_size + offset.
            block_tables: `[sequence, block_max]`; entries past a sequence's last block are unread.
            context_lens: `[sequence]`, computed tokens after this step.
            query_starts: `[sequence + 1]`, where each sequence's rows begin.
            sampled_rows: `[sampled]` int64, rows whose logits are wanted.

        Returns:
            `[sampled, vocab]` float32 logits, and `[sampled]` int64 their largest's index, the first if there are
            several, -1 where logits are not finite.

        Raises:
            ValueError: a shape or a dtype does not fit.
            MemoryError: no memory for the step.
        """
        geometry, sampled, sequences = self.geometry, len(sampled_rows), len(context_lens)
        count = len(slots)
        slot = slot_elements(geometry.head_dim, geometry.kv_dtype)
        shape = (None, len(self.weights.layers), 2, geometry.kv_heads, geometry.block_size, slot)
        check_shape("cache", cache, shape)
        check_dtype("cache", cache, (geometry.kv_dtype,))
        for name, tensor in (("tokens", tokens), ("positions", positions), ("slots", slots), ("rows", sampled_rows)):
            check_dtype(name, tensor, (torch.int64,))
        tables = np.ascontiguousarray(block_tables)
        lens, starts = np.ascontiguousarray(context_lens), np.ascontiguousarray(query_starts)
        if min(len(tokens), len(positions)) < count or len(starts) != sequences + 1 or len(tables) != sequences:
            message = f"tokens: {len(tokens)} and {len(positions)} for {count} slots of {sequences} sequences"
            raise ValueError(message)
        logits = torch.empty(sampled, self._stride, dtype=torch.float32)
        best = torch.empty(sampled, dtype=torch.int64)
        arguments = BatchArguments(
            *(count, sequences, sampled, tables.shape[1]),
            *(tokens.data_ptr(), positions.data_ptr(), slots.data_ptr()),
            *(tables.ctypes.data, lens.ctypes.data, starts.ctypes.data),
            *(sampled_rows.data_ptr(), cache.data_ptr(), logits.data_ptr(), best.data_ptr()),
        )
        if self._step(self._runner, ctypes.byref(arguments)):
            message = f"no memory for a step of {count} tokens"
            raise MemoryError(message)
        return logits[:, : geometry.vocab], best


def _address(part: torch.Tensor | Matrix | None) -> int | MatrixArguments | None:
    if isinstance(part, Matrix):
        return MatrixArguments(part.panels.data_ptr(), part.format)
    return None if part is None else part.data_ptr()


def _model_arguments(geometry: Geometry, weights: DecoderWeights) -> ModelArguments:
    """Returns the structure for `quire_cpu_open`, which copies it."""
    layers = (LayerArguments * len(weights.layers))(
        *(
            LayerArguments(*(_address(getattr(layer, field.name)) for field in dataclasses.fields(layer)))
            for layer in weights.layers
        )
    )
    return ModelArguments(
        *(geometry.hidden, geometry.inner, geometry.heads, geometry.kv_heads, geometry.head_dim),
        *(len(weights.layers), geometry.vocab, geometry.block_size, geometry.window),
        *(CACHE_FORMATS[geometry.kv_dtype], geometry.eps, layers),
        *(_address(weights.embeddings), _address(weights.head), _address(weights.final_norm)),
        *(_address(weights.cosines), _address(weights.sines)),
    )
