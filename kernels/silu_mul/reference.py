"""Plain torch in float64: what the kernel is measured against."""

import torch


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Returns `silu(gate) * up` of `[row, gate | up]`, in float64.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    gate, up = gate_up.double().chunk(2, -1)
    return gate * torch.sigmoid(gate) * up
