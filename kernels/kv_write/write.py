"""Triton: one program a token."""

import math

import torch
import triton
import triton.language as tl

from kernels.checks import check_caches, check_dtype, check_last_axis_dense, check_same_device, check_shape
from kernels.configs import lookup
from kernels.layout import ACTIVATION_DTYPES, KV_DTYPES


@triton.jit
def to_cache(x, inverse_scale, KIND: tl.constexpr):
    """Returns `x * inverse_scale` rounded to the cache's type; float8 saturates at its largest number."""
    return (x.to(tl.float32) * inverse_scale).to(KIND)


@triton.jit
def _kv_write(
    key_ptr,
    value_ptr,
    k_ptr,
    v_ptr,
    slot_ptr,
    k_inverse,
    v_inverse,
    stride_key_token,
    stride_key_head,
    stride_value_token,
    stride_value_head,
    stride_k_block: tl.int64,
    stride_k_head,
    stride_k_slot,
    stride_v_block: tl.int64,
    stride_v_head,
    stride_v_slot,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ELEMENTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Grid (token,)."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token)
    if slot < 0:
        return
    elements = tl.arange(0, ELEMENTS)
    mask = elements < NUM_KV_HEADS * HEAD_DIM
    heads = elements // HEAD_DIM
    dims = elements % HEAD_DIM
    key = tl.load(key_ptr + token * stride_key_token + heads * stride_key_head + dims, mask=mask)
    value = tl.load(value_ptr + token * stride_value_token + heads * stride_value_head + dims, mask=mask)
    block = slot // BLOCK_SIZE
    offset = slot % BLOCK_SIZE
    k_target = k_ptr + block * stride_k_block + heads * stride_k_head + offset * stride_k_slot + dims
    v_target = v_ptr + block * stride_v_block + heads * stride_v_head + offset * stride_v_slot + dims
    tl.store(k_target, to_cache(key, k_inverse, k_ptr.dtype.element_ty), mask=mask)
    tl.store(v_target, to_cache(value, v_inverse, v_ptr.dtype.element_ty), mask=mask)


def check_scale(name: str, scale: float) -> None:
    """Checks that a scale can be divided by, and that its inverse is a float32.

    Raises:
        ValueError: it is not positive, or too large or small.
    """
    smallest = torch.finfo(torch.float32).smallest_normal
    if not (math.isfinite(scale) and smallest <= scale <= 1.0 / smallest):
        message = f"{name}: a positive float32 whose inverse is one, too, expected, found {scale}"
        raise ValueError(message)


def kv_write(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Writes each token's key and value into its slot. Writes `k_cache` and `v_cache`.

    Args:
        key: `[token, kv_head, head_dim]`, dense in the last axis; float32, bfloat16 or float16.
        value: like `key`.
        k_cache: `[block, kv_head, block_size, head_dim]`, dense in the last axis, any type of KV_DTYPES.
        v_cache: like `k_cache`.
        slots: `[token]` int64, block * block_size + offset, each at most once; negative: nothing is written.
        k_scale: keys are divided by it before they are rounded to the cache's type.
        v_scale: the same for values.

    Raises:
        ValueError: a shape, dtype, device or scale does not fit.
    """
    check_shape("key", key, (None, None, None))
    token_count, num_kv_heads, head_dim = key.shape
    check_shape("value", value, key.shape)
    check_shape("slots", slots, (token_count,))
    check_dtype("slots", slots, (torch.int64,))
    check_caches(k_cache, v_cache, num_kv_heads, head_dim, KV_DTYPES)
    for name, tensor in (("key", key), ("value", value)):
        check_dtype(name, tensor, ACTIVATION_DTYPES)
        check_last_axis_dense(name, tensor)
    check_same_device(key=key, value=value, k_cache=k_cache, v_cache=v_cache, slots=slots)
    check_scale("k_scale", k_scale)
    check_scale("v_scale", v_scale)
    if token_count == 0:
        return
    config = lookup("kv_write", key.device, head_dim=head_dim)
    _kv_write[(token_count,)](
        key, value, k_cache, v_cache, slots, 1.0 / k_scale, 1.0 / v_scale,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        v_cache.stride(0), v_cache.stride(1), v_cache.stride(2),
        NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, ELEMENTS=triton.next_power_of_2(num_kv_heads * head_dim),
        BLOCK_SIZE=k_cache.shape[2], num_warps=config["num_warps"],
    )  # fmt: skip
