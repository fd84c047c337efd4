"""Attention over the cache, behind one protocol: torch everywhere, Triton on GPUs."""

import os
from typing import Protocol

import torch

from execsvc.batch import Batch
from execsvc.kv_cache import KVCache
from kernels.kv_write import flat
from kernels.layout import layer_views
from kernels.paged_attention import tiled
from quire.errors import ConfigError


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
        from kernels.paged_attention import decode, prefill  # noqa: PLC0415 - the same

        self._write, self._decode, self._prefill = write, decode, prefill
        self._cache = cache
        self._window = window
        self._scale = cache.layout.head_dim**-0.5
        self._batch: Batch | None = None

    def begin(self, batch: Batch) -> None:
        """Moves tables and lengths to the device."""
        device = self._cache.device
        self._batch = batch
        self._tables = torch.from_numpy(batch.block_tables).to(device)
        self._lens = torch.from_numpy(batch.context_lens).to(device, torch.int32)
        split = batch.decode_count
        self._starts = torch.from_numpy(batch.query_starts[split:] - split).to(device, torch.int32)
        counts = batch.query_starts[1:] - batch.query_starts[:-1]
        self._max_query_count = int(counts.max(initial=0))
        self._max_decode_len = int(batch.context_lens[:split].max(initial=0))

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See AttentionBackend."""
        assert self._batch is not None, "begin comes first"
        split, count = self._batch.decode_count, self._batch.token_count
        keys, values = layer_views(self._cache.data, layer)
        self._write.kv_write(k[:count], v[:count], keys, values, self._batch.slots)
        out = torch.zeros_like(q)
        if split:
            out[:split] = self._decode.paged_attention_decode(
                q[:split], keys, values, self._tables[:split], self._lens[:split], self._max_decode_len, self._scale,
                self._window,
            )  # fmt: skip
        if count > split:
            out[split:count] = self._prefill.paged_attention_prefill(
                q[split:count], keys, values, self._tables[split:], self._lens[split:], self._starts,
                self._max_query_count, self._scale, self._window,
            )  # fmt: skip
        return out


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
