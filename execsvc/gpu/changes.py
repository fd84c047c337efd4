"""What changes logits, by row, on the device: tokens that a sequence has, tokens that its request names.

The host writes a row when a sequence is added, from the tokens that it brings along: a prompt, or all of it when it
comes back after a preemption or parts from another one. From then on the device counts what it samples itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from execsvc.gpu.staging import Staging
from execsvc.sampler import NAMED_TOKEN_LIMIT, SamplingSpec
from kernels.sampling.tensors import WITHHELD, Changes

_NARROW_LEN: Final = 2**14
"""Longest sequence whose counts fit into 16 bits."""

_PORTION: Final = 65536
"""Elements that are written at once."""

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.int32]


class ResidentChanges:
    """State of `row_count` rows over a vocabulary. Rows that a sequence does not use are never read."""

    def __init__(self, row_count: int, vocab_size: int, max_model_len: int, device: torch.device) -> None:
        """Allocates it, zeroed."""
        dtype = torch.int16 if max_model_len < _NARROW_LEN else torch.int32
        self.seen = torch.zeros(row_count, vocab_size, dtype=dtype, device=device)
        self._entry_tokens = torch.zeros(row_count, NAMED_TOKEN_LIMIT, dtype=torch.int32, device=device)
        self._entry_bias = torch.zeros(row_count, NAMED_TOKEN_LIMIT, device=device)
        self._entry_counts = torch.zeros(row_count, dtype=torch.int32, device=device)
        self._counts_written = np.zeros(row_count, dtype=np.int64)
        self._new_seen: dict[int, tuple[Ints, Ints]] = {}
        self._new_entries: dict[int, tuple[Words, Words]] = {}

    def at(self, rows: torch.Tensor, mask_places: torch.Tensor, masks: torch.Tensor) -> Changes:
        """Returns the state of a batch.

        Args:
            rows: `[place]` int32, -1 for padding.
            mask_places: see `kernels.sampling.tensors.Changes`.
            masks: see there.
        """
        return Changes(self.seen, self._entry_tokens, self._entry_bias, self._entry_counts, rows, mask_places, masks)

    def row_added(self, row: int, tokens: Ints, sampling: SamplingSpec) -> None:
        """Notes what the sequence that takes a row brings along."""
        self._new_seen.pop(row, None)
        if sampling.penalizes:
            self._new_seen[row] = _seen(tokens, sampling.prompt_token_count)
        count = 0
        if sampling.bias or sampling.withheld:
            self._new_entries[row] = entries = _entries(sampling)
            count = len(entries[0])
        elif self._counts_written[row]:
            self._new_entries[row] = (np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int32))
        self._counts_written[row] = count

    def send(self, staging: Staging) -> None:
        """Writes what was noted to the device, behind all that was launched so far. Uses buffers of `staging`."""
        if self._new_seen:
            rows = np.array(list(self._new_seen), dtype=np.int64)
            staging.begin()
            device_rows = staging.put(rows)
            staging.send()
            self.seen.index_fill_(0, device_rows.long(), 0)
            self._write(staging, self.seen, self._new_seen)
            self._new_seen = {}
        if self._new_entries:
            counts = {row: (np.zeros(1, dtype=np.int64), [len(words[0])]) for row, words in self._new_entries.items()}
            self._write(staging, self._entry_counts[:, None], counts)
            for place, state in enumerate((self._entry_tokens, self._entry_bias.view(torch.int32))):
                columns = {row: (np.arange(len(words[0])), words[place]) for row, words in self._new_entries.items()}
                self._write(staging, state, columns)
            self._new_entries = {}

    @staticmethod
    def _write(staging: Staging, state: torch.Tensor, news: Mapping[int, tuple[Ints, npt.ArrayLike]]) -> None:
        """Writes {row: (columns, values)} to `state` `[row, column]`, as much at once as a buffer holds."""
        rows = np.repeat(np.array(list(news), dtype=np.int64), [len(columns) for columns, _ in news.values()])
        columns = np.concatenate([columns for columns, _ in news.values()])
        values = np.concatenate([np.asarray(values) for _, values in news.values()])
        most = min(_PORTION, staging.size // 4)
        for first in range(0, len(rows), most):
            part = slice(first, first + most)
            staging.begin()
            at_rows, at_columns = staging.put(rows[part]), staging.put(columns[part])
            words = staging.put(values[part])
            staging.send()
            state.index_put_((at_rows.long(), at_columns.long()), words.to(state.dtype))


def _seen(tokens: Ints, prompt_token_count: int) -> tuple[Ints, Ints]:
    """Returns (tokens, what `Changes.seen` has of each) of the distinct tokens of a sequence."""
    distinct, places = np.unique(tokens, return_inverse=True)
    values = 2 * np.bincount(places[prompt_token_count:], minlength=len(distinct))
    values[places[:prompt_token_count]] |= 1
    return distinct, values


def _entries(sampling: SamplingSpec) -> tuple[Words, Words]:
    """Returns (tokens, bits of their bias) of the tokens that a request names, ascending."""
    named = {**dict.fromkeys(sampling.withheld, 0.0), **dict(sampling.bias)}
    tokens = np.array(sorted(named), dtype=np.int64)
    bias = np.array([named[token] for token in tokens.tolist()], dtype=np.float32)
    withheld = np.isin(tokens, np.array(sampling.withheld, dtype=np.int64))
    return (tokens + np.where(withheld, WITHHELD, 0)).astype(np.int32), bias.view(np.int32)
