"""Launches of the attention kernels, at the shapes of an 8B model."""

from __future__ import annotations

import torch

from tests.kernels.compile_gate import CompileCase, Expectation


def _decode() -> None:
    from kernels.paged_attention.decode import paged_attention_decode
    from kernels.paged_attention.options import AttentionOptions, HeadShape
    from kernels.paged_attention.workspace import DecodeWorkspace

    cache = torch.zeros(9, 1, 2, 8, 16, 128, dtype=torch.bfloat16)
    q = torch.zeros(4, 32, 128, dtype=torch.bfloat16)
    tables = torch.ones(4, 8, dtype=torch.int32)
    lens = torch.full((4,), 100, dtype=torch.int32)
    workspace = DecodeWorkspace(HeadShape(32, 8, 128, 16), 4, q.dtype, q.device)
    workspace.refresh(lens)
    paged_attention_decode(q, cache[:, 0, 0], cache[:, 0, 1], tables, lens, AttentionOptions(0.1), workspace)


def _prefill() -> None:
    from kernels.paged_attention.options import AttentionOptions
    from kernels.paged_attention.prefill import paged_attention_prefill

    cache = torch.zeros(9, 1, 2, 8, 16, 128, dtype=torch.bfloat16)
    q = torch.zeros(4, 32, 128, dtype=torch.bfloat16)
    tables = torch.ones(1, 8, dtype=torch.int32)
    lens = torch.full((1,), 100, dtype=torch.int32)
    starts = torch.tensor([0, 4], dtype=torch.int32)
    paged_attention_prefill(q, cache[:, 0, 0], cache[:, 0, 1], tables, lens, starts, AttentionOptions(0.1))


CASES = [
    CompileCase(
        "decode bf16 32/8x128",
        _decode,
        {"_partition": Expectation(), "_decode": Expectation(wide_async=True), "_merge_parts": Expectation()},
    ),
    CompileCase("prefill bf16 32/8x128", _prefill, {"_prefill": Expectation(wide_async=True, matrix_unit=True)}),
]
