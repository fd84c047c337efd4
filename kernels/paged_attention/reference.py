"""Plain torch in float64: what every faster attention is measured against. Slow on purpose, obvious on purpose."""

import torch

from kernels.checks import group_size


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_starts: torch.Tensor,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """Attends the last queries of each sequence to its cached keys and values, causally.

    Args:
        q: `[token, query_head, head_dim]`, the sequences' new tokens one after the other.
        k_cache: `[block, kv_head, block_size, head_dim]`.
        v_cache: like `k_cache`.
        block_tables: `[sequence, block_max]` integers; entries past a sequence's last block are unread.
        context_lens: `[sequence]`, cached tokens of each, its new ones included; 0 for an empty sequence.
        query_starts: `[sequence + 1]`, where each sequence's queries begin in `q`.
        scale: factor on the scores.
        window: each query sees this many positions, its own included; 0 for all.

    Returns:
        `[token, query_head, head_dim]` float64. Tokens that belong to no sequence are zero.
    """
    group = group_size(q.shape[1], k_cache.shape[1])
    block_size = k_cache.shape[2]
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for sequence in range(len(context_lens)):
        length = int(context_lens[sequence])
        start, end = int(query_starts[sequence]), int(query_starts[sequence + 1])
        if length == 0 or start == end:
            continue
        blocks = block_tables[sequence, : -(-length // block_size)].long()
        # [block, kv_head, slot, dim] -> [kv_head, position, dim], cut to the length: nothing beyond it is touched.
        keys, values = (
            cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length].double().repeat_interleave(group, 0)
            for cache in (k_cache, v_cache)
        )
        scores = torch.einsum("qhd,hkd->hqk", q[start:end].double(), keys) * scale
        query_positions = torch.arange(length - (end - start), length, device=q.device)[:, None]
        key_positions = torch.arange(length, device=q.device)[None]
        hidden = key_positions > query_positions
        if window:
            hidden |= query_positions - key_positions >= window
        weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1)
        out[start:end] = torch.einsum("hqk,hkd->qhd", weights, values)
    return out
