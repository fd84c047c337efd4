"""Triton: turns groups of sequences that share a prefix into pieces of work, on the device.

The members of a group are cut into items of up to `members_per_item` sequences, whose queries are computed together: a
key of the prefix is then read once for all of them. The items of group g begin at number floor(members before g /
members_per_item) + g, which leaves room for all of them whatever the groups are.
"""

from collections.abc import Iterable

import torch
import triton
import triton.language as tl

from kernels.paged_attention.group_columns import GroupColumns
from kernels.paged_attention.partition import Partition
from kernels.paged_attention.row_blocks import find_sequence


@triton.jit(do_not_specialize=["group_max"])
def _cut_groups(
    starts_ptr,
    members_ptr,
    shared_ptr,
    len_ptr,
    item_ends_ptr,
    item_starts_ptr,
    item_firsts_ptr,
    item_counts_ptr,
    sequence_items_ptr,
    sequence_places_ptr,
    sequence_starts_ptr,
    group_max,
    WINDOW: tl.constexpr,
    MEMBERS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Grid (item): describes one item, and tells its members where they are."""
    item = tl.program_id(0)
    group, first_item = find_sequence(starts_ptr, group_max, item, 0, 1, MEMBERS)
    start = tl.load(starts_ptr + group)
    first = start + (item - first_item) * MEMBERS
    count = tl.minimum(tl.load(starts_ptr + group + 1) - first, MEMBERS)
    shared = tl.load(shared_ptr + group)
    count = tl.where(shared > 0, tl.maximum(count, 0), 0)
    shared = tl.where(count > 0, shared, 0)
    lanes = tl.arange(0, LANES)
    inside = lanes < count
    sequences = tl.load(members_ptr + first + lanes, mask=inside, other=0)
    floor = 0
    if WINDOW > 0:
        lens = tl.load(len_ptr + sequences, mask=inside, other=2147483647)
        floor = tl.minimum(tl.maximum(tl.min(lens, 0) - WINDOW, 0), shared)
    tl.store(item_ends_ptr + item, shared)
    tl.store(item_starts_ptr + item, floor)
    tl.store(item_firsts_ptr + item, first)
    tl.store(item_counts_ptr + item, count)
    tl.store(sequence_items_ptr + sequences, tl.zeros_like(sequences) + item, mask=inside)
    tl.store(sequence_places_ptr + sequences, lanes, mask=inside)
    tl.store(sequence_starts_ptr + sequences, tl.zeros_like(sequences) + shared, mask=inside)


class PrefixGroups:
    """Up to `group_max` groups among up to `sequence_max` sequences, at addresses that stay.

    The caller writes `columns`, on the device; `refresh` derives the rest from them.
    """

    def __init__(
        self,
        group_max: int,
        sequence_max: int,
        members_per_item: int,
        workers: int,
        tile: int,
        windows: Iterable[int],
        device: torch.device,
    ) -> None:
        """Allocates, without any group."""

        def integers(count: int) -> torch.Tensor:
            return torch.zeros(count, dtype=torch.int32, device=device)

        self.columns = GroupColumns.allocate(group_max, sequence_max, device)
        self.members_per_item = members_per_item
        self.item_max = sequence_max // members_per_item + group_max
        self.item_ends = integers(self.item_max)
        self.item_firsts = integers(self.item_max)
        self.item_counts = integers(self.item_max)
        self.sequence_items = integers(sequence_max)
        self.sequence_places = integers(sequence_max)
        self.sequence_starts = integers(sequence_max)
        self.item_starts = {window: integers(self.item_max) for window in windows}
        self.partitions = {
            window: Partition.allocate(self.item_max, workers, tile, 1, 0, device) for window in self.item_starts
        }

    def refresh(self, context_lens: torch.Tensor) -> None:
        """Shares out the prefixes of a step. Does not wait for the device.

        Args:
            context_lens: `[sequence]` int32, cached tokens of each.
        """
        columns = self.columns
        self.sequence_items.fill_(-1)
        self.sequence_starts.zero_()
        for window, item_starts in self.item_starts.items():
            _cut_groups[(self.item_max,)](
                columns.starts, columns.members, columns.shared, context_lens, self.item_ends, item_starts,
                self.item_firsts, self.item_counts, self.sequence_items, self.sequence_places, self.sequence_starts,
                columns.shared.shape[0], WINDOW=window, MEMBERS=self.members_per_item,
                LANES=triton.next_power_of_2(self.members_per_item), num_warps=1,
            )  # fmt: skip
            self.partitions[window].refresh(self.item_ends, item_starts)
