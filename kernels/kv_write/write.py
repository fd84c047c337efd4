"""Triton: one program a token."""

import torch
import triton
import triton.language as tl

from kernels.checks import check_cache, check_dtype, check_last_axis_dense, check_same_device, check_shape


@triton.jit
def _kv_write(
    key_ptr,
    value_ptr,
    k_ptr,
    v_ptr,
    slot_ptr,
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
    tl.store(k_target, key.to(k_ptr.dtype.element_ty), mask=mask)
    tl.store(v_target, value.to(v_ptr.dtype.element_ty), mask=mask)


def kv_write(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """Writes each token's key and value into its slot. Writes `k_cache` and `v_cache`.

    Args:
        key: `[token, kv_head, head_dim]`, dense in the last axis.
        value: like `key`.
        k_cache: `[block, kv_head, block_size, head_dim]`, dense in the last axis.
        v_cache: like `k_cache`.
        slots: `[token]` int64, block * block_size + offset, each at most once; negative: nothing is written.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    token_count, num_kv_heads, head_dim = key.shape
    check_shape("value", value, key.shape)
    check_shape("slots", slots, (token_count,))
    check_dtype("slots", slots, (torch.int64,))
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_cache(name, cache, num_kv_heads, head_dim)
    for name, tensor in (("key", key), ("value", value)):
        check_last_axis_dense(name, tensor)
    check_same_device(key=key, value=value, k_cache=k_cache, v_cache=v_cache, slots=slots)
    if token_count == 0:
        return
    _kv_write[(token_count,)](
        key, value, k_cache, v_cache, slots,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        v_cache.stride(0), v_cache.stride(1), v_cache.stride(2),
        NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, ELEMENTS=triton.next_power_of_2(num_kv_heads * head_dim),
        BLOCK_SIZE=k_cache.shape[2], num_warps=4,
    )  # fmt: skip
