"""Plain torch in float64: what the kernels are measured against."""

import torch


def rms_norm(rows: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Returns `rows / sqrt(mean(rows^2) + eps) * weight` over the last axis, in float64.

    Args:
        rows: `[..., size]`, any float type.
        weight: `[size]`.
        eps: added to the mean.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    wide = rows.double()
    return wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.double()
