"""Triton: rotary embedding and the write to the cache in one launch, some heads of a token to a program."""

import torch
import triton
import triton.language as tl

from kernels.checks import check_caches, check_dtype, check_same_device, check_shape
from kernels.configs import lookup
from kernels.kv_write.write import check_scale, to_cache
from kernels.layout import KV_DTYPES
from kernels.rotary.rotate import check_rotary


@triton.jit
def _rotate_and_write(
    heads_ptr,
    cosine_ptr,
    sine_ptr,
    position_ptr,
    slot_ptr,
    k_ptr,
    v_ptr,
    k_inverse,
    v_inverse,
    stride_row: tl.int64,
    stride_head,
    stride_table,
    stride_k_block: tl.int64,
    stride_k_head,
    stride_k_slot,
    stride_v_block: tl.int64,
    stride_v_head,
    stride_v_slot,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    DIMS: tl.constexpr,
    REST: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Grid (row, group of HEADS heads): queries are turned in place, keys and values go to their slot."""
    row = tl.program_id(0)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    slot = tl.load(slot_ptr + row)
    position = tl.load(position_ptr + row).to(tl.int64)
    # Padding has a slot before the cache: nothing is written there, but an address is computed.
    block = tl.maximum(slot, 0) // BLOCK_SIZE
    offset = tl.maximum(slot, 0) % BLOCK_SIZE
    is_query = heads < NUM_HEADS
    is_key = (heads >= NUM_HEADS) & (heads < NUM_HEADS + NUM_KV_HEADS) & (slot >= 0)
    is_value = (heads >= NUM_HEADS + NUM_KV_HEADS) & (heads < NUM_HEADS + 2 * NUM_KV_HEADS) & (slot >= 0)
    source = heads_ptr + row * stride_row + heads * stride_head
    key_target = k_ptr + block * stride_k_block + offset * stride_k_slot + (heads - NUM_HEADS) * stride_k_head
    value_head = heads - NUM_HEADS - NUM_KV_HEADS
    value_target = v_ptr + block * stride_v_block + offset * stride_v_slot + value_head * stride_v_head

    dims = tl.arange(0, DIMS)
    turned = dims < HALF
    cosine = tl.load(cosine_ptr + position * stride_table + dims, mask=turned, other=0)[None, :]
    sine = tl.load(sine_ptr + position * stride_table + dims, mask=turned, other=0)[None, :]
    moved = (is_query | is_key | is_value)[:, None] & turned[None, :]
    first = tl.load(source[:, None] + dims[None, :], mask=moved, other=0).to(tl.float32)
    second = tl.load(source[:, None] + HALF + dims[None, :], mask=moved, other=0).to(tl.float32)
    low, high = first * cosine - second * sine, second * cosine + first * sine
    query_mask = is_query[:, None] & turned[None, :]
    key_mask = is_key[:, None] & turned[None, :]
    value_mask = is_value[:, None] & turned[None, :]
    for part in tl.static_range(2):
        at = dims[None, :] + part * HALF
        rotated = low if part == 0 else high
        plain = first if part == 0 else second
        tl.store(source[:, None] + at, rotated.to(heads_ptr.dtype.element_ty), mask=query_mask)
        tl.store(key_target[:, None] + at, to_cache(rotated, k_inverse, k_ptr.dtype.element_ty), mask=key_mask)
        tl.store(value_target[:, None] + at, to_cache(plain, v_inverse, v_ptr.dtype.element_ty), mask=value_mask)
    if REST > 0:
        others = 2 * HALF + tl.arange(0, REST)
        inside = (others < HEAD_DIM)[None, :]
        left = tl.load(source[:, None] + others[None, :], mask=(is_key | is_value)[:, None] & inside, other=0)
        left = left.to(tl.float32)
        key_rest, value_rest = key_target[:, None] + others[None, :], value_target[:, None] + others[None, :]
        tl.store(key_rest, to_cache(left, k_inverse, k_ptr.dtype.element_ty), mask=is_key[:, None] & inside)
        tl.store(value_rest, to_cache(left, v_inverse, v_ptr.dtype.element_ty), mask=is_value[:, None] & inside)


def rotate_and_write(
    heads: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """Turns queries and keys, and writes keys and values into their slots. Writes `heads` and both caches.

    Args:
        heads: `[row, query heads | key heads | value heads, head_dim]`, dense in the last axis; float32, bfloat16 or
            float16. The queries are turned in place, keys and values are left as they are.
        cosines: `[position, rotary_dim / 2]` float32, contiguous, rotary_dim <= head_dim.
        sines: like `cosines`.
        positions: `[row]` int32 or int64, each a row of the tables.
        k_cache: `[block, kv_head, block_size, head_dim]`, dense in the last axis, any type of KV_DTYPES.
        v_cache: like `k_cache`.
        slots: `[row]` int64, block * block_size + offset, each at most once; negative: nothing is written.
        k_scale: keys are divided by it before they are rounded to the cache's type.
        v_scale: the same for values.

    Returns:
        The queries, a view of `heads`: `[row, query_head, head_dim]`.

    Raises:
        ValueError: a shape, dtype, device or scale does not fit.
    """
    row_count, head_count, head_dim = check_rotary(heads, cosines, sines, positions)
    num_kv_heads = k_cache.shape[1] if k_cache.dim() > 1 else 0
    check_caches(k_cache, v_cache, num_kv_heads, head_dim, KV_DTYPES)
    num_heads = head_count - 2 * num_kv_heads
    if num_heads < 0:
        message = f"heads: at least {2 * num_kv_heads} expected, the cache's keys and values, found {head_count}"
        raise ValueError(message)
    check_shape("slots", slots, (row_count,))
    check_dtype("slots", slots, (torch.int64,))
    check_same_device(heads=heads, k_cache=k_cache, v_cache=v_cache, slots=slots)
    check_scale("k_scale", k_scale)
    check_scale("v_scale", v_scale)
    if row_count == 0:
        return heads[:, :num_heads]
    half = cosines.shape[1]
    dims = triton.next_power_of_2(half)
    rest = head_dim - 2 * half
    config = lookup("rotate_and_write", heads.device, head_dim=head_dim)
    per_program = min(max(1, config["elements"] // dims), triton.next_power_of_2(head_count))
    _rotate_and_write[(row_count, triton.cdiv(head_count, per_program))](
        heads, cosines, sines, positions, slots, k_cache, v_cache, 1.0 / k_scale, 1.0 / v_scale,
        heads.stride(0), heads.stride(1), cosines.stride(0),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        v_cache.stride(0), v_cache.stride(1), v_cache.stride(2),
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, HALF=half, DIMS=dims,
        REST=triton.next_power_of_2(rest) if rest else 0, HEADS=per_program, BLOCK_SIZE=k_cache.shape[2],
        num_warps=config["num_warps"],
    )  # fmt: skip
    return heads[:, :num_heads]
