"""Launches of the attention kernels, at the shapes of an 8B model."""

from __future__ import annotations

import torch

from tests.kernels.compile_gate import CompileCase, Expectation


def _decode() -> None:
    from kernels.paged_attention.decode import paged_attention_decode

    cache = torch.zeros(9, 1, 2, 8, 16, 128, dtype=torch.bfloat16)
    q = torch.zeros(4, 32, 128, dtype=torch.bfloat16)
    tables = torch.ones(4, 8, dtype=torch.int32)
    lens = torch.full((4,), 100, dtype=torch.int32)
    paged_attention_decode(q, cache[:, 0, 0], cache[:, 0, 1], tables, lens, 100, 0.1)


def _prefill() -> None:
    from kernels.paged_attention.prefill import paged_attention_prefill

    cache = torch.zeros(9, 1, 2, 8, 16, 128, dtype=torch.bfloat16)
    q = torch.zeros(4, 32, 128, dtype=torch.bfloat16)
    tables = torch.ones(1, 8, dtype=torch.int32)
    lens = torch.full((1,), 100, dtype=torch.int32)
    starts = torch.tensor([0, 4], dtype=torch.int32)
    paged_attention_prefill(q, cache[:, 0, 0], cache[:, 0, 1], tables, lens, starts, 4, 0.1)


CASES = [
    CompileCase("decode bf16 32/8x128", _decode, {"_decode_split": Expectation(), "_decode_merge": Expectation()}),
    CompileCase("prefill bf16 32/8x128", _prefill, {"_prefill": Expectation()}),
]
