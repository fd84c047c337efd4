"""Scales of a float8 KV cache: what each layer's keys and values are divided by before they are rounded.

e4m3 holds numbers up to 448 with 3 bits of mantissa, and loses bits below 2^-6. A scale brings a layer's keys and
values into that range. They come from the checkpoint, or from the first prompt (`--calculate-kv-scales`), or are 1.
Once the first token is written they stay, because what is cached was divided by them.
"""

from __future__ import annotations

from collections.abc import Sequence
import math
from typing import Final

import torch

_KEY_PEAK: Final = 200.0
_VALUE_PEAK: Final = 100.0
"""What the largest key and value of the first prompt become: later ones may be twice or four times as large."""


class KVScales:
    """`(key scale, value scale)` of each layer, host floats: captured graphs hold them as constants.

    Args:
        layer_count: layers of the model.
        known: scales of a checkpoint, a pair a layer; None where it has none.
    """

    def __init__(self, layer_count: int, known: Sequence[tuple[float, float]] | None = None) -> None:
        self.pairs: list[tuple[float, float]] = [(1.0, 1.0)] * layer_count if known is None else list(known)
        self.origin = "1" if known is None else "checkpoint"
        self.measuring = False
        """Whether the next keys and values of each layer decide."""

    def measure(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Sets the scales of a layer by the largest of its first keys and values; waits for the device.

        Args:
            layer: index of the layer.
            keys: any shape, rotated.
            values: any shape.
        """
        self.pairs[layer] = (_scale(keys, _KEY_PEAK), _scale(values, _VALUE_PEAK))

    def finish(self) -> None:
        """Ends measuring: the scales stay."""
        self.measuring = False
        self.origin = "first prompt"

    def described(self) -> dict[str, float | str]:
        """Returns where they come from and between which bounds they are, for the log."""
        keys, values = zip(*self.pairs, strict=True)
        return {
            "origin": self.origin,
            "k_scale_min": min(keys),
            "k_scale_max": max(keys),
            "v_scale_min": min(values),
            "v_scale_max": max(values),
        }


def _scale(data: torch.Tensor, peak: float) -> float:
    """Returns what makes the largest number of `data` `peak`; 1 where there is none that says anything."""
    largest = float(data.abs().amax()) if data.numel() else 0.0
    scale = largest / peak
    return scale if math.isfinite(scale) and scale >= torch.finfo(torch.float32).smallest_normal else 1.0
