"""Plain torch: what every faster kv_write must equal, bit for bit."""

import torch

from kernels.rotary import reference as rotary


def quantize(data: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Returns `data * (1 / scale)` in `dtype`: nearest, ties to even; float8 saturates, NaN stays.

    Args:
        data: any float type.
        scale: its inverse is taken in float32, as the kernels do.
        dtype: of the cache.
    """
    scaled = data.float() * torch.tensor(1.0 / scale, dtype=torch.float32)
    if dtype == torch.float8_e4m3fn:
        largest = torch.finfo(dtype).max
        scaled = scaled.clamp(-largest, largest)
    return scaled.to(dtype)


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
        key: `[token, kv_head, head_dim]`.
        value: like `key`.
        k_cache: `[block, kv_head, block_size, head_dim]`, any strides and float type.
        v_cache: like `k_cache`.
        slots: `[token]` int64, block * block_size + offset, each at most once; negative: nothing is written.
        k_scale: keys are divided by it.
        v_scale: values are divided by it.
    """
    kept = slots >= 0
    blocks, offsets = slots[kept] // k_cache.shape[2], slots[kept] % k_cache.shape[2]
    for cache, data, scale in ((k_cache, key, k_scale), (v_cache, value, v_scale)):
        new = quantize(data[kept], scale, cache.dtype)
        # float8 cannot be indexed everywhere; its bits can.
        if cache.element_size() == 1:
            cache.view(torch.uint8)[blocks, :, offsets] = new.view(torch.uint8)
        else:
            cache[blocks, :, offsets] = new


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
    """Turns queries and keys, writes keys and values, and returns the queries in float64. Writes both caches.

    Args:
        heads: `[row, query heads | key heads | value heads, head_dim]`.
        cosines: `[position, rotary_dim / 2]`.
        sines: like `cosines`.
        positions: `[row]`.
        k_cache: see `kv_write`.
        v_cache: see `kv_write`.
        slots: see `kv_write`.
        k_scale: see `kv_write`.
        v_scale: see `kv_write`.
    """
    num_kv_heads = k_cache.shape[1]
    num_heads = heads.shape[1] - 2 * num_kv_heads
    turned = rotary.rotate(heads[:, : num_heads + num_kv_heads], cosines, sines, positions)
    values = heads[:, num_heads + num_kv_heads :]
    kv_write(turned[:, num_heads:], values, k_cache, v_cache, slots, k_scale, v_scale)
    return turned[:, :num_heads]
