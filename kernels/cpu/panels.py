"""How weights, keys and values lie in memory for the step: panels of 16 outputs (panels.h draws them).

    matrix [output, input]                        -> [output / 16, input / 2, 16, 2]
    keys of a head of a block [block_size, dim]   -> [block_size / 16, dim / 2, 16, 2]
    values, the same                              -> [block_size / 16, dim / 16, 8, 16, 2]

A block of the cache has the same bytes as in `kernels.layout`, so copies, resets and sizes know nothing of panels.
"""

import torch
from torch.nn import functional

LANE = 16
"""Outputs of a panel."""
PAIR = 2 * LANE
"""Outputs are padded to whole pairs of panels."""


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Returns the panels of `weight` `[output, input]` bfloat16, outputs padded with zeros to a multiple of PAIR."""
    rows = -len(weight) % PAIR
    padded = functional.pad(weight, (0, 0, 0, rows)) if rows else weight
    return padded.view(-1, LANE, weight.shape[1] // 2, 2).transpose(1, 2).contiguous()


def pack_gate_up(gate_up: torch.Tensor) -> torch.Tensor:
    """Returns the panels of `gate_up` `[gate and up, input]`: one of the gate, one of up, and so on."""
    inputs = gate_up.shape[1]
    woven = gate_up.view(2, -1, LANE, inputs).transpose(0, 1).reshape(-1, inputs)
    return pack(woven)


def pad_bias(bias: torch.Tensor) -> torch.Tensor:
    """Returns `bias` `[output]` in float32, padded as the panels are."""
    return functional.pad(bias.float(), (0, -len(bias) % PAIR))


def unpack_keys(block: torch.Tensor) -> torch.Tensor:
    """Returns `[block_size, head_dim]` from the panels of one head's keys, given in that shape."""
    size, dim = block.shape
    return block.reshape(size // LANE, dim // 2, LANE, 2).transpose(1, 2).reshape(size, dim)


def unpack_values(block: torch.Tensor) -> torch.Tensor:
    """Returns `[block_size, head_dim]` from the panels of one head's values, given in that shape."""
    size, dim = block.shape
    panels = block.reshape(size // LANE, dim // LANE, LANE // 2, LANE, 2)
    return panels.permute(0, 2, 4, 1, 3).reshape(size, dim)
