"""Plain torch: what every faster step_state kernel must equal, bit for bit."""

import torch

from kernels.step_state.tensors import Resident, Staged


def apply_writes(state: torch.Tensor, offsets: torch.Tensor, values: torch.Tensor) -> None:
    """Sets single elements. Writes `state`.

    Args:
        state: `[element]` int32.
        offsets: `[write]` int32, distinct.
        values: `[write]` int32.
    """
    state.index_copy_(0, offsets.long(), values)


def stage_decode(resident: Resident, rows: torch.Tensor, staged: Staged, block_size: int) -> None:
    """Gathers what a decode step reads. Writes `staged`; entries of its tables past the last block are unspecified.

    Args:
        resident: the state of all rows.
        rows: `[place]` int32, the row at each place of the batch; -1 is padding: length 0, slot -1, all else 0.
        staged: as long as `rows`.
        block_size: tokens of a block.
    """
    used = rows >= 0
    safe = rows.clamp_min(0).long()
    positions = torch.where(used, resident.computed[safe], 0)
    tables = resident.tables[safe]
    blocks = tables.gather(1, (positions // block_size).long()[:, None])[:, 0]
    slots = blocks.long() * block_size + positions % block_size
    staged.tokens.copy_(torch.where(used, resident.tokens[safe], 0))
    staged.positions.copy_(positions)
    staged.slots.copy_(torch.where(used, slots, -1))
    staged.lens.copy_(torch.where(used, positions + 1, 0))
    staged.tables.copy_(tables)
    staged.params.copy_(torch.where(used, resident.params[:, safe], 0))


def advance(
    resident: Resident, rows: torch.Tensor, lens: torch.Tensor, sampled: torch.Tensor, places: torch.Tensor
) -> None:
    """Takes note of a step. Writes `resident.computed` and `resident.tokens`.

    Args:
        resident: the state of all rows.
        rows: `[place]` int32; -1 is padding and changes nothing.
        lens: `[place]` int32, computed tokens after the step.
        sampled: `[sample]` int32; a negative one (no token could be chosen) is kept as 0.
        places: `[place]` int32, which sample is the place's; -1 for none.
    """
    spare = resident.computed.shape[0]
    _scatter(resident.computed, torch.where(rows >= 0, rows, spare), lens)
    sampling = (rows >= 0) & (places >= 0)
    tokens = sampled[places.clamp_min(0).long()].clamp_min(0) if len(sampled) else places
    _scatter(resident.tokens, torch.where(sampling, rows, spare), tokens)


def _scatter(column: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """Sets `column[rows] = values`; row `len(column)` stands for none. Writes `column`. Shapes depend on no content."""
    longer = torch.cat([column, column[:1]])
    longer.index_copy_(0, rows.long(), values)
    column.copy_(longer[:-1])
