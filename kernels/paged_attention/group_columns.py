"""Which sequences of a step share a prefix, as the device reads it: columns in one tensor, at addresses that stay."""

import dataclasses

import torch

_ALIGNMENT = 4
"""Words; 16 bytes. Compiled kernels differ by whether a pointer is aligned."""


@dataclasses.dataclass(frozen=True, slots=True)
class GroupColumns:
    """Up to `group_max` groups among up to `sequence_max` sequences. All int32, views of one tensor."""

    state: torch.Tensor
    """`[word]`: all of it."""
    starts: torch.Tensor
    """`[group_max + 1]`: where each group's sequences begin in `members`; equal for one that is not used."""
    members: torch.Tensor
    """`[sequence_max]`: sequences, that is rows of queries, group after group; each in one group at most."""
    shared: torch.Tensor
    """`[group_max]`: tokens that the members of a group share, fewer than each of them has; 0 for none."""

    @classmethod
    def allocate(cls, group_max: int, sequence_max: int, device: torch.device) -> "GroupColumns":
        """Returns columns without any group."""
        sizes = (group_max + 1, sequence_max, group_max)
        begins, end = [], 0
        for size in sizes:
            begins.append(end)
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        state = torch.zeros(end, dtype=torch.int32, device=device)
        return cls(state, *(state[begin : begin + size] for begin, size in zip(begins, sizes, strict=True)))


def with_shared_blocks(columns: GroupColumns, tables: torch.Tensor, block_size: int) -> torch.Tensor:
    """Returns block tables in which what a group shares is taken from its first member: what cascade attends to.

    Shapes depend on no content.

    Args:
        columns: the groups.
        tables: `[sequence, block_max]` int32.
        block_size: tokens of a block.
    """
    count = len(tables)
    positions = torch.arange(len(columns.members), device=tables.device, dtype=torch.int32)
    groups = torch.searchsorted(columns.starts[1:], positions, right=True).clamp_max(len(columns.shared) - 1)
    used = positions < columns.starts[-1]
    # What is no member goes to a row behind the last.
    members = torch.where(used, columns.members, count).long()
    leaders = torch.arange(count + 1, device=tables.device)
    leaders[members] = columns.members[columns.starts[groups].clamp_max(len(positions) - 1)].long()
    blocks = torch.zeros(count + 1, dtype=torch.int32, device=tables.device)
    blocks[members] = columns.shared[groups] // block_size
    shared = torch.arange(tables.shape[1], device=tables.device) < blocks[:count, None]
    return torch.where(shared, tables[leaders[:count].clamp_max(count - 1)], tables)
