"""Plain torch: what every faster kv_write must equal, bit for bit."""

import torch


def kv_write(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """Writes each token's key and value into its slot. Writes `k_cache` and `v_cache`.

    Args:
        key: `[token, kv_head, head_dim]`.
        value: like `key`.
        k_cache: `[block, kv_head, block_size, head_dim]`, any strides.
        v_cache: like `k_cache`.
        slots: `[token]` int64, block * block_size + offset, each at most once; negative: nothing is written.
    """
    kept = slots >= 0
    blocks, offsets = slots[kept] // k_cache.shape[2], slots[kept] % k_cache.shape[2]
    k_cache[blocks, :, offsets] = key[kept].to(k_cache.dtype)
    v_cache[blocks, :, offsets] = value[kept].to(v_cache.dtype)
