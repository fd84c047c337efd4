"""The state of open sequences on the device, and what of it the host has changed since the last step.

The host keeps a mirror of block tables and of how sequences start. What changes is noted as offsets; a step sends
(offset, value) pairs, so it costs what changed, not what is open. `computed` and `tokens` are advanced by the device
itself: in the mirror they are those of the sequence's start.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from execsvc.gpu.changes import ResidentChanges
from execsvc.prefix_tree import PrefixTree
from execsvc.sampler import SamplingSpec
from kernels.step_state.tensors import PARAMETERS, Resident

Words = npt.NDArray[np.int32]

_SEED_MASK = 0xFFFFFFFF


class ResidentRows:
    """Mirror and device state of `row_count` rows. Implements `execsvc.sequences.RowObserver`."""

    def __init__(self, row_count: int, block_max: int, changes: ResidentChanges, device: torch.device) -> None:
        """Allocates both, zeroed; `changes` is told of new rows, too."""
        self.changes = changes
        self.prefixes: PrefixTree | None = None
        """Hears of every change of a table, too."""
        self.device_state = Resident.allocate(row_count, block_max, device)
        mirror = Resident.allocate(row_count, block_max, torch.device("cpu"))
        self._mirror: Words = mirror.state.numpy()
        self.tables: Words = mirror.tables.numpy()
        """`[row, block_max]`: the host's block tables; who writes says so with `table_written`."""
        self._columns: Words = self._mirror[row_count * block_max :].reshape(2 + len(PARAMETERS), row_count)
        self._floats = self._columns.view(np.float32)
        self._row_count, self._block_max = row_count, block_max
        self._single: list[int] = []
        self._runs: list[npt.NDArray[np.int64]] = []

    def table_written(self, row: int, start: int, stop: int) -> None:
        """Notes that entries `start` .. `stop` - 1 of a row's table have changed."""
        if self.prefixes is not None:
            self.prefixes.table_written(row, start, stop)
        first = row * self._block_max
        if stop - start == 1:
            self._single.append(first + start)
        elif stop > start:
            self._runs.append(np.arange(first + start, first + stop))

    def row_added(self, row: int, tokens: npt.NDArray[np.int64], computed: int, sampling: SamplingSpec) -> None:
        """Notes the start of a sequence: its known tokens, where it stands, how it samples."""
        columns, floats = self._columns, self._floats
        columns[0, row], columns[1, row] = computed, tokens[-1]
        floats[2, row] = sampling.temperature
        columns[3, row] = min(sampling.top_k, 2**31 - 1)
        floats[4, row], floats[5, row] = sampling.top_p, sampling.min_p
        seeds = np.array([sampling.seed & _SEED_MASK, sampling.seed >> 32], dtype=np.uint32).view(np.int32)
        columns[6:8, row] = seeds
        floats[8, row] = sampling.typical_p
        floats[9, row] = sampling.repetition_penalty
        floats[10, row], floats[11, row] = sampling.frequency_penalty, sampling.presence_penalty
        columns[12, row] = min(sampling.withheld_until, 2**31 - 1)
        columns[13, row] = -1 if sampling.logprobs is None else sampling.logprobs
        self.changes.row_added(row, tokens, sampling)
        first = self._row_count * self._block_max
        self._runs.append(first + row + self._row_count * np.arange(2 + len(PARAMETERS)))

    def row_dropped(self, row: int) -> None:
        """Notes the end of a sequence; what the device still has of it nobody reads."""
        if self.prefixes is not None:
            self.prefixes.row_dropped(row)

    def take_writes(self) -> tuple[npt.NDArray[np.int64], Words]:
        """Returns (offsets, values) of what has changed since the last call; offsets are distinct."""
        if not self._runs and not self._single:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32)
        offsets = np.array(self._single, dtype=np.int64)
        if self._runs:
            offsets = np.concatenate([offsets, *self._runs])
        if len(offsets) > 1:
            offsets = np.unique(offsets)
        self._single, self._runs = [], []
        return offsets, self._mirror[offsets]
