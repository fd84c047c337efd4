"""Decode and prefill in one call: sequences with one query first, then chunks of prompts."""

import torch

from kernels.checks import check_shape
from kernels.paged_attention.decode import paged_attention_decode
from kernels.paged_attention.options import AttentionOptions, check_outputs
from kernels.paged_attention.prefill import paged_attention_prefill
from kernels.paged_attention.workspace import DecodeWorkspace


def paged_attention_mixed(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_starts: torch.Tensor,
    decode_count: int,
    options: AttentionOptions,
    workspace: DecodeWorkspace,
    *,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attends a batch of decoding sequences and chunks of prompts, each with the kernel that suits it.

    Args:
        q: `[token, query_head, head_dim]`; row i < decode_count is sequence i's, then come the chunks.
        k_cache: as in `paged_attention_decode`.
        v_cache: like `k_cache`.
        block_tables: `[sequence, block_max]` int32.
        context_lens: `[sequence]` int32; `workspace.refresh` has seen the first `decode_count` of them.
        query_starts: `[sequence + 1]` int32, where each sequence's queries begin in `q`.
        decode_count: sequences, from the first, that have one query (or are padding, of length 0).
        options: scale, window and the like.
        workspace: scratch for the decoding ones; written.
        out: where the result goes; None for a new tensor.
        lse: `[token, query_head]` float32, written; None if nobody wants it.

    Returns:
        `out`, as the two functions give it.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    out = check_outputs(q, out, lse)
    sequence_count = context_lens.shape[0]
    check_shape("query_starts", query_starts, (sequence_count + 1,))
    if not 0 <= decode_count <= min(sequence_count, q.shape[0]):
        message = f"decode_count: 0 to {min(sequence_count, q.shape[0])} expected, found {decode_count}"
        raise ValueError(message)
    if decode_count:
        paged_attention_decode(
            q[:decode_count], k_cache, v_cache, block_tables[:decode_count], context_lens[:decode_count], options,
            workspace, out=out[:decode_count], lse=None if lse is None else lse[:decode_count],
        )  # fmt: skip
    if decode_count < sequence_count:
        paged_attention_prefill(
            q, k_cache, v_cache, block_tables[decode_count:], context_lens[decode_count:], query_starts[decode_count:],
            options, out=out, lse=lse,
        )  # fmt: skip
    return out
