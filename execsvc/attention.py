"""Attention over the cache, behind one protocol: torch everywhere, Triton on GPUs."""

import os
from typing import TYPE_CHECKING, Protocol

import torch

from execsvc.batch import Batch
from execsvc.kv_cache import KVCache
from kernels.kv_write import flat
from kernels.layout import layer_views
from kernels.paged_attention import tiled
from quire.errors import ConfigError

if TYPE_CHECKING:
    from kernels.paged_attention.workspace import DecodeWorkspace

_SEQUENCES = 64
"""Fewest sequences that there is scratch for."""
NATIVE = "native"
"""Name of the backend that is part of the compiled CPU step, which is no AttentionBackend of its own."""


class AttentionBackend(Protocol):
    """Writes a step's keys and values and attends to the cache."""

    name: str

    def begin(self, batch: Batch) -> None:
        """Prepares for one step."""
        ...

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Writes `k` and `v` of the batch's tokens, then attends; padding rows of the result are unspecified finite.

        Args:
            layer: index of the layer.
            q: `[padded row, head, head_dim]`.
            k: `[padded row, kv_head, head_dim]`.
            v: like `k`.

        Returns:
            Like `q`.
        """
        ...


class TorchAttention:
    """Torch, in tiles whose results do not depend on company (see `kernels.paged_attention.tiled`)."""

    name = "torch"

    def __init__(self, cache: KVCache, window: int) -> None:
        """Attends to `cache`, each query to its last `window` positions (0: all)."""
        self._cache = cache
        self._window = window
        self._scale = cache.layout.head_dim**-0.5
        self._groups: list[tiled.TileGroup] = []
        self._rows = torch.empty(0)
        self._token_count = 0

    def begin(self, batch: Batch) -> None:
        """Computes the indices of the step."""
        layout = self._cache.layout
        self._groups = tiled.plan_tiles(
            layout, batch.block_tables, batch.context_lens, batch.query_starts, self._window, self._cache.device
        )
        self._rows = flat.plan_rows(layout, batch.slots)
        self._token_count = batch.token_count

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See AttentionBackend."""
        cache, count = self._cache, self._token_count
        flat.write_rows(cache.data, cache.layout, layer, self._rows, k[:count], v[:count])
        return tiled.attend_tiles(q, cache.data, cache.layout, layer, self._groups, self._scale)


class TritonAttention:
    """Triton kernels: one for sequences with one token, one for chunks of prompts."""

    name = "triton"

    def __init__(self, cache: KVCache, window: int) -> None:
        """Attends to `cache`, each query to its last `window` positions (0: all)."""
        from kernels.kv_write import write  # noqa: PLC0415 - triton is imported only where it is used
        from kernels.paged_attention import mixed, options, workspace  # noqa: PLC0415 - the same

        self._write, self._mixed, self._modules = write, mixed, (options, workspace)
        self._cache = cache
        self._options = options.AttentionOptions(cache.layout.head_dim**-0.5, window=window)
        self._batch: Batch | None = None
        self._workspace: DecodeWorkspace | None = None
        self._partitioned = False

    def begin(self, batch: Batch) -> None:
        """Moves tables and lengths to the device."""
        device = self._cache.device
        self._batch = batch
        self._tables = torch.from_numpy(batch.block_tables).to(device)
        self._lens = torch.from_numpy(batch.context_lens).to(device, torch.int32)
        self._starts = torch.from_numpy(batch.query_starts).to(device, torch.int32)
        self._partitioned = False

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See AttentionBackend."""
        assert self._batch is not None, "begin comes first"
        count, decode_count = self._batch.token_count, self._batch.decode_count
        keys, values = layer_views(self._cache.data, layer)
        self._write.kv_write(k[:count], v[:count], keys, values, self._batch.slots)
        workspace = self._partition(q.shape[1], decode_count)
        out = torch.zeros_like(q)
        self._mixed.paged_attention_mixed(
            q[:count], keys, values, self._tables, self._lens, self._starts, decode_count, self._options, workspace,
            out=out[:count],
        )  # fmt: skip
        return out

    def _partition(self, num_heads: int, decode_count: int) -> "DecodeWorkspace":
        """Returns a workspace that is large enough, in which this step's contexts are shared out."""
        options, workspace = self._modules
        layout = self._cache.layout
        if self._workspace is None or self._workspace.sequence_max < decode_count:
            shape = options.HeadShape(num_heads, layout.num_kv_heads, layout.head_dim, layout.block_size)
            sequence_max = max(_SEQUENCES, 1 << (decode_count - 1).bit_length())
            self._workspace = workspace.DecodeWorkspace(
                shape, sequence_max, layout.dtype, self._cache.device, windows=(self._options.window,)
            )
        if decode_count and not self._partitioned:
            self._workspace.refresh(self._lens[:decode_count])
            self._partitioned = True
        return self._workspace


def create(name: str, cache: KVCache, window: int) -> AttentionBackend:
    """Returns the backend of this name; "auto" is triton on CUDA and torch elsewhere.

    Raises:
        ConfigError: an unknown name, or triton is not installed.
    """
    if name == "auto":
        name = "triton" if cache.device.type == "cuda" else "torch"
    if name == "torch":
        return TorchAttention(cache, window)
    if name != "triton":
        raise ConfigError(f"attention_backend: {name!r} is not one of auto, torch, triton", field="attention_backend")
    if cache.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            "attention_backend: triton needs a GPU (or its slow interpreter, TRITON_INTERPRET=1); "
            "use --attention-backend torch",
            field="attention_backend",
        )
    try:
        return TritonAttention(cache, window)
    except ImportError as error:
        raise ConfigError(
            f"attention_backend: triton is not installed ({error}); use --attention-backend torch",
            field="attention_backend",
        ) from error
