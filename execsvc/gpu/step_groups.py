"""Groups of the sequences of one step that share a prefix, brought to the device as what has changed since the last."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from execsvc.prefix_tree import PrefixTree
from kernels.paged_attention.group_columns import GroupColumns

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.int32]

_UNGROUPED = -1


class StepGroups:
    """Chooses the groups of a step and keeps a mirror of the device's columns.

    Args:
        tree: groups of all open rows.
        columns: where the device reads those of a step.
        block_size: tokens of a block.
    """

    def __init__(self, tree: PrefixTree, columns: GroupColumns, block_size: int) -> None:
        self.columns = columns
        self._tree = tree
        self._block_size = block_size
        self._group_max, self._sequence_max = len(columns.shared), len(columns.members)
        self._mirror = GroupColumns.allocate(self._group_max, self._sequence_max, torch.device("cpu"))
        self._sent: Words = self._mirror.state.numpy()
        image = GroupColumns.allocate(self._group_max, self._sequence_max, torch.device("cpu"))
        self._image: Words = image.state.numpy()
        self._starts: Words = image.starts.numpy()
        self._members: Words = image.members.numpy()
        self._shared: Words = image.shared.numpy()
        self._rows: Ints = np.empty(0, dtype=np.int64)
        self._version = _UNGROUPED
        self._paying = False

    def select(self, rows: Ints, computed: Ints) -> bool:
        """Returns whether the groups of a step pay; nothing is done if it is composed like the last one.

        Args:
            rows: `[place]`, the rows of its sequences with one query.
            computed: `[place]`, their computed tokens before the step; they only rise while a row is open.
        """
        if self._version == self._tree.version and np.array_equal(rows, self._rows):
            return self._paying
        self._version, self._rows = self._tree.version, rows.copy()
        self._paying = self._compose(rows, computed)
        return self._paying

    def take_writes(self) -> tuple[Ints, Words]:
        """Returns (offsets, values) of what has changed in `columns.state` since the last call."""
        offsets = np.flatnonzero(self._image != self._sent)
        values = self._image[offsets]
        self._sent[offsets] = values
        return offsets, values

    def _compose(self, rows: Ints, computed: Ints) -> bool:
        """Writes the image of a step's columns, if its groups pay."""
        groups, rules = self._tree.row_groups[rows], self._tree.rules
        places = np.flatnonzero(groups != _UNGROUPED)
        if len(places) < 2:  # noqa: PLR2004 - nobody shares with nobody
            return False
        places = places[np.argsort(groups[places], kind="stable")]
        ids, starts, counts = np.unique(groups[places], return_index=True, return_counts=True)
        # A member's last query must not be in the prefix, whatever tables say.
        least = np.minimum.reduceat(computed[places], starts) // self._block_size * self._block_size
        tokens = np.minimum(self._tree.shared_tokens[ids], least)
        saved = (counts + -counts // rules.members_per_item) * tokens
        kept = saved >= rules.group_tokens
        if np.count_nonzero(kept) > self._group_max:
            kept[np.argsort(-saved, kind="stable")[self._group_max :]] = False
        if not kept.any() or saved[kept].sum() < rules.step_tokens:
            return False
        ends = np.cumsum(counts[kept])
        self._starts[1 : len(ends) + 1] = ends
        self._starts[len(ends) + 1 :] = ends[-1]
        self._members[: ends[-1]] = places[np.repeat(kept, counts)]
        self._shared[: len(ends)] = tokens[kept]
        return True
