"""Checks of kernel arguments. A message names the argument, what was expected and what was found."""

from collections.abc import Sequence

import torch


def check_shape(name: str, tensor: torch.Tensor, expected: Sequence[int | None]) -> None:
    """Checks the shape of `tensor`; None stands for any size.

    Raises:
        ValueError: the shape does not fit.
    """
    fits = tensor.dim() == len(expected) and all(
        size is None or size == found for size, found in zip(expected, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        message = f"{name}: shape [{wanted}] expected, found {list(tensor.shape)}"
        raise ValueError(message)


def check_dtype(name: str, tensor: torch.Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Checks the element type of `tensor`.

    Raises:
        ValueError: the type is not one of `allowed`.
    """
    if tensor.dtype not in allowed:
        message = f"{name}: dtype of {list(allowed)} expected, found {tensor.dtype}"
        raise ValueError(message)


def check_same_device(**tensors: torch.Tensor) -> None:
    """Checks that all tensors are on one device.

    Raises:
        ValueError: they are not.
    """
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        message = f"one device expected, found {devices}"
        raise ValueError(message)


def check_last_axis_dense(name: str, tensor: torch.Tensor) -> None:
    """Checks that the last axis of `tensor` has stride 1.

    Raises:
        ValueError: it has not.
    """
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        message = f"{name}: stride 1 in the last axis expected, found strides {tensor.stride()}"
        raise ValueError(message)


def check_caches(
    k_cache: torch.Tensor, v_cache: torch.Tensor, num_kv_heads: int, head_dim: int, allowed: Sequence[torch.dtype]
) -> None:
    """Checks one layer's keys and values, both `[block, kv_head, block_size, head_dim]` of one type in `allowed`.

    Raises:
        ValueError: shape, type or strides do not fit.
    """
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_shape(name, cache, (None, num_kv_heads, None, head_dim))
        check_last_axis_dense(name, cache)
        check_dtype(name, cache, allowed)
    # Kernels take sizes from the keys alone.
    check_shape("v_cache", v_cache, k_cache.shape)
    check_dtype("v_cache", v_cache, (k_cache.dtype,))


def group_size(num_heads: int, num_kv_heads: int) -> int:
    """Returns how many query heads share a key/value head.

    Raises:
        ValueError: the heads cannot be divided evenly.
    """
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        message = f"q: a number of heads that is a multiple of {num_kv_heads} (kv heads) expected, found {num_heads}"
        raise ValueError(message)
    return num_heads // num_kv_heads
