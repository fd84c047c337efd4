"""Tiles, warps and stages by device, head size and element type.

Rows were chosen by what the compiler makes of them: no spilled register, at least two tiles of keys and values in
flight, and shared memory for two programs of decode per multiprocessor. `tests/kernels` compiles every row.
"""

import dataclasses
import os
from typing import TypeVar

import torch
from triton.runtime import driver

from kernels.paged_attention.options import HeadShape


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How decode is compiled."""

    tile: int
    """Positions of a tile."""
    warps: int
    """Warps of a program."""
    stages: int
    """Depth of the pipeline: stages - 1 tiles of keys and values are in flight."""
    programs: int
    """Programs per multiprocessor."""


@dataclasses.dataclass(frozen=True, slots=True)
class PrefillConfig:
    """How prefill is compiled."""

    rows: int
    """Rows of a program; a row is one query head at one token."""
    tile: int
    """Positions of a tile."""
    warps: int
    """Warps of a program."""
    stages: int
    """Depth of the pipeline."""


_DECODE = {
    # (head elements, padded; bytes of a cache element): by compute capability.
    (64, 1): {90: DecodeConfig(64, 4, 4, 2)},
    (64, 2): {80: DecodeConfig(64, 4, 4, 2), 90: DecodeConfig(64, 4, 4, 3)},
    (128, 1): {90: DecodeConfig(64, 4, 3, 2)},
    (128, 2): {80: DecodeConfig(64, 4, 3, 2), 90: DecodeConfig(64, 4, 3, 2)},
    (256, 1): {90: DecodeConfig(32, 4, 3, 2)},
    (256, 2): {80: DecodeConfig(32, 4, 3, 2), 90: DecodeConfig(32, 4, 3, 2)},
}
_PREFILL = {
    (64, 1): {90: PrefillConfig(128, 64, 8, 3)},
    (64, 2): {80: PrefillConfig(128, 64, 8, 3), 90: PrefillConfig(128, 64, 8, 3)},
    (128, 1): {90: PrefillConfig(128, 64, 8, 3)},
    (128, 2): {80: PrefillConfig(64, 32, 4, 3), 90: PrefillConfig(128, 64, 8, 2)},
    (256, 1): {90: PrefillConfig(128, 32, 8, 3)},
    (256, 2): {80: PrefillConfig(64, 32, 8, 2), 90: PrefillConfig(128, 32, 8, 2)},
}
_WIDE_DECODE = DecodeConfig(32, 4, 2, 1)
_WIDE_PREFILL = PrefillConfig(32, 32, 4, 2)
_LEAST_DIMS = 64
_WIDE_BYTES = 4
_INTERPRETED_PROCESSORS = 4


def _capability(device: torch.device) -> int:
    """Returns the compute capability to compile for, as 10 * major + minor."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    if os.environ.get("TRITON_INTERPRET") == "1":
        return 90
    # Tensors are elsewhere when kernels are only compiled, for a device that is not there.
    return int(driver.active.get_current_target().arch)


_Config = TypeVar("_Config", DecodeConfig, PrefillConfig)


def _pick(
    table: dict[tuple[int, int], dict[int, _Config]], wide: _Config, device: torch.device, dims: int, itemsize: int
) -> _Config:
    """Returns the row for a device: that of the newest architecture that is not newer."""
    if itemsize >= _WIDE_BYTES:
        return wide
    rows = table.get((max(dims, _LEAST_DIMS), itemsize))
    if rows is None:
        message = f"head_dim: at most {max(dims for dims, _ in table)} expected, found {dims} (padded)"
        raise ValueError(message)
    capability = _capability(device)
    fitting = [row for row in rows if row <= capability]
    if not fitting:
        message = f"k_cache: elements of {itemsize} bytes need compute capability {min(rows)}, found {capability}"
        raise ValueError(message)
    return rows[max(fitting)]


def decode_config(device: torch.device, shape: HeadShape, kv_dtype: torch.dtype) -> DecodeConfig:
    """Returns how decode is compiled for a device, heads and an element type of the cache.

    Raises:
        ValueError: the device or the kernels cannot do that.
    """
    return _pick(_DECODE, _WIDE_DECODE, device, shape.dims, kv_dtype.itemsize)


def prefill_config(device: torch.device, shape: HeadShape, kv_dtype: torch.dtype) -> PrefillConfig:
    """Returns how prefill is compiled for a device, heads and an element type of the cache.

    Raises:
        ValueError: the device or the kernels cannot do that.
    """
    return _pick(_PREFILL, _WIDE_PREFILL, device, shape.dims, kv_dtype.itemsize)


def worker_count(device: torch.device, num_kv_heads: int, config: DecodeConfig) -> int:
    """Returns how many programs per kv head fill the device."""
    processors = _INTERPRETED_PROCESSORS
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, processors * config.programs // num_kv_heads)
