"""Plain torch in float64: what every faster attention is measured against. Slow on purpose, obvious on purpose.

For a query at position p, over the positions j <= p (and p - j < window, if there is one):

    x_j = scale * q . (k_scale * k_j)                        scaled products (Vaswani et al., 2017)
    y_j = soft_cap * tanh(x_j / soft_cap)                    soft cap (Gemma 2, 2024)
    out = sum_j e^(y_j) v_scale v_j / (sum_j e^(y_j) + e^sink)   sinks: one score more in the sum (gpt-oss, 2025)
    lse = log(sum_j e^(y_j) + e^sink)
"""

import torch

from kernels.checks import group_size
from kernels.paged_attention.options import AttentionOptions


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_starts: torch.Tensor,
    options: AttentionOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attends the last queries of each sequence to its cached keys and values, causally.

    Args:
        q: `[token, query_head, head_dim]`, the sequences' new tokens one after the other.
        k_cache: `[block, kv_head, block_size, head_dim]`, any float type.
        v_cache: like `k_cache`.
        block_tables: `[sequence, block_max]` integers; entries past a sequence's last block are unread.
        context_lens: `[sequence]`, cached tokens of each, its new ones included; 0 for an empty sequence.
        query_starts: `[sequence + 1]`, where each sequence's queries begin in `q`.
        options: scale, window and the like.

    Returns:
        `[token, query_head, head_dim]` and `[token, query_head]` (natural logarithm of the sum of exponentials),
        float64. Tokens that belong to no sequence or to an empty one are zero, and -inf (or their sink).
    """
    group = group_size(q.shape[1], k_cache.shape[1])
    block_size = k_cache.shape[2]
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=torch.float64, device=q.device)
    if options.sinks is not None:
        lse = options.sinks.double().expand(q.shape[:2]).clone()
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
        scores = torch.einsum("qhd,hkd->hqk", q[start:end].double(), keys) * (options.scale * options.k_scale)
        if options.soft_cap:
            scores = options.soft_cap * torch.tanh(scores / options.soft_cap)
        query_positions = torch.arange(length - (end - start), length, device=q.device)[:, None]
        key_positions = torch.arange(length, device=q.device)[None]
        hidden = key_positions > query_positions
        if options.window:
            hidden |= query_positions - key_positions >= options.window
        scores = scores.masked_fill(hidden, float("-inf"))
        total = torch.logsumexp(scores, -1)
        if options.sinks is not None:
            total = torch.logaddexp(total, options.sinks.double()[:, None])
        weights = torch.exp(scores - total[:, :, None])
        out[start:end] = torch.einsum("hqk,hkd->qhd", weights, values) * options.v_scale
        lse[start:end] = total.T
    return out, lse
