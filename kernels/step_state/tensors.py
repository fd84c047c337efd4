"""The tensors that the step_state kernels work on."""

import dataclasses
from typing import Final

import torch

PARAMETERS: Final = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed_low",
    "seed_high",
    "typical_p",
    "repetition",
    "frequency",
    "presence",
    "withheld_until",
    "logprobs",
)
"""Rows of `params`, in order; floats as their bits. `logprobs` is -1 where none are reported."""


@dataclasses.dataclass(frozen=True, slots=True)
class Resident:
    """State of every row, views of one tensor. All int32."""

    state: torch.Tensor
    """`[element]`: all of it."""
    tables: torch.Tensor
    """`[row, block_max]`: block tables; entries past a sequence's last block are unspecified, inside the pool."""
    computed: torch.Tensor
    """`[row]`: tokens whose keys and values are written."""
    tokens: torch.Tensor
    """`[row]`: the last known token."""
    params: torch.Tensor
    """`[parameter, row]`: see PARAMETERS."""

    @classmethod
    def allocate(cls, row_count: int, block_max: int, device: torch.device) -> "Resident":
        """Returns zeroed state.

        Raises:
            ValueError: it has more elements than 32 bits can count.
        """
        size = row_count * (block_max + 2 + len(PARAMETERS))
        if size >= 2**31:
            message = f"row_count: {row_count} rows of {block_max} blocks are {size} elements, at most {2**31 - 1}"
            raise ValueError(message)
        state = torch.zeros(size, dtype=torch.int32, device=device)
        table_end = row_count * block_max
        columns = state[table_end:].view(2 + len(PARAMETERS), row_count)
        return cls(state, state[:table_end].view(row_count, block_max), columns[0], columns[1], columns[2:])


@dataclasses.dataclass(frozen=True, slots=True)
class Staged:
    """What a decode step reads, a place of the batch each."""

    tokens: torch.Tensor
    """`[place]` int64."""
    positions: torch.Tensor
    """`[place]` int64."""
    slots: torch.Tensor
    """`[place]` int64; -1 for padding."""
    lens: torch.Tensor
    """`[place]` int32: tokens attended to; 0 for padding."""
    tables: torch.Tensor
    """`[place, block_max]` int32."""
    params: torch.Tensor
    """`[parameter, place]` int32."""

    @classmethod
    def allocate(cls, place_count: int, block_max: int, device: torch.device) -> "Staged":
        """Returns zeroed buffers."""
        wide = torch.zeros(3, place_count, dtype=torch.int64, device=device)
        lens = torch.zeros(place_count, dtype=torch.int32, device=device)
        tables = torch.zeros(place_count, block_max, dtype=torch.int32, device=device)
        params = torch.zeros(len(PARAMETERS), place_count, dtype=torch.int32, device=device)
        return cls(wide[0], wide[1], wide[2], lens, tables, params)

    def head(self, place_count: int) -> "Staged":
        """Returns views of the first places."""
        return Staged(
            self.tokens[:place_count],
            self.positions[:place_count],
            self.slots[:place_count],
            self.lens[:place_count],
            self.tables[:place_count],
            self.params[:, :place_count],
        )
