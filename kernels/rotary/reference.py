"""Plain torch in float64: what the kernels are measured against."""

import torch


def rotate(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Returns `heads` with element i turned with element i + rotary_dim / 2, in float64.

    Args:
        heads: `[row, head, head_dim]`, any float type.
        cosines: `[position, rotary_dim / 2]`, rotary_dim <= head_dim.
        sines: like `cosines`.
        positions: `[row]`.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
    """
    half = cosines.shape[1]
    out = heads.double()
    first, second = out[..., :half].clone(), out[..., half : 2 * half].clone()
    cosine, sine = cosines[positions.long()].double()[:, None], sines[positions.long()].double()[:, None]
    out[..., :half] = first * cosine - second * sine
    out[..., half : 2 * half] = second * cosine + first * sine
    return out
