"""How attention is launched on a device, for heads and an element type: rows of the tables in `kernels.configs`.

The defaults were chosen by what the compiler makes of them: no spilled register, at least two tiles of keys and values
in flight, and shared memory for two programs of decode per multiprocessor. `tests/kernels` compiles them.
"""

import dataclasses
import os

import torch
from triton.runtime import driver

from kernels.configs import lookup
from kernels.paged_attention.options import HeadShape

_FLOAT8_CAPABILITY = 89
_HOPPER = 90
_INTERPRETED_PROCESSORS = 4


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How decode is compiled."""

    tile: int
    """Positions of a tile."""
    num_warps: int
    """Warps of a program."""
    num_stages: int
    """Depth of the pipeline: num_stages - 1 tiles of keys and values are in flight."""
    programs: int
    """Programs per multiprocessor."""


@dataclasses.dataclass(frozen=True, slots=True)
class RowsConfig:
    """How attention of many rows is compiled: prefill, and decode over a shared prefix."""

    rows: int
    """Rows of a program; a row is one query head at one token."""
    tile: int
    """Positions of a tile."""
    num_warps: int
    """Warps of a program."""
    num_stages: int
    """Depth of the pipeline."""


def _capability(device: torch.device) -> int:
    """Returns the compute capability to compile for, as 10 * major + minor."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    if os.environ.get("TRITON_INTERPRET") == "1":
        return _HOPPER
    # Tensors are elsewhere when kernels are only compiled, for a device that is not there.
    return int(driver.active.get_current_target().arch)


def _row(kernel: str, device: torch.device, shape: HeadShape, kv_dtype: torch.dtype) -> dict[str, int]:
    """Returns a row of the device's table.

    Raises:
        ValueError: the device has no arithmetic for the element type of the cache.
    """
    capability = _capability(device)
    if kv_dtype.itemsize == 1 and capability < _FLOAT8_CAPABILITY:
        message = f"k_cache: {kv_dtype} needs compute capability 8.9, found {capability / 10}"
        raise ValueError(message)
    return dict(
        lookup(
            kernel, device, head_dim=shape.dims, kv_bytes=kv_dtype.itemsize, capability=capability, group=shape.group
        )
    )


def decode_config(device: torch.device, shape: HeadShape, kv_dtype: torch.dtype) -> DecodeConfig:
    """Returns how decode is compiled for a device, heads and an element type of the cache.

    Raises:
        ValueError: the device has no arithmetic for the element type.
    """
    return DecodeConfig(**_row("paged_decode", device, shape, kv_dtype))


def prefill_config(device: torch.device, shape: HeadShape, kv_dtype: torch.dtype) -> RowsConfig:
    """Returns how prefill is compiled for a device, heads and an element type of the cache.

    Raises:
        ValueError: the device has no arithmetic for the element type.
    """
    return RowsConfig(**_row("paged_prefill", device, shape, kv_dtype))


def prefix_config(device: torch.device, shape: HeadShape, kv_dtype: torch.dtype) -> RowsConfig:
    """Returns how attention to shared prefixes is compiled for a device, heads and an element type of the cache.

    Raises:
        ValueError: the device has no arithmetic for the element type.
    """
    return RowsConfig(**_row("paged_prefix", device, shape, kv_dtype))


def split_config(device: torch.device, shape: HeadShape, kv_dtype: torch.dtype) -> RowsConfig:
    """Returns how prefill with shared-out contexts is compiled for a device, heads and an element type of the cache.

    Raises:
        ValueError: the device has no arithmetic for the element type.
    """
    return RowsConfig(**_row("paged_prefill_split", device, shape, kv_dtype))


def _processors(device: torch.device) -> int:
    """Returns how many multiprocessors a device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return _INTERPRETED_PROCESSORS


def worker_count(device: torch.device, num_kv_heads: int, config: DecodeConfig) -> int:
    """Returns how many programs per kv head fill the device."""
    return max(1, _processors(device) * config.programs // num_kv_heads)


def row_worker_count(device: torch.device, num_kv_heads: int) -> int:
    """Returns how many programs of many rows per kv head fill the device: one takes a whole multiprocessor."""
    return max(1, _processors(device) // num_kv_heads)
