"""Launches of the kernels that move keys and values, at the shapes of an 8B model."""

from __future__ import annotations

import torch

from tests.kernels.compile_gate import CompileCase, Expectation


def _kv_write() -> None:
    from kernels.kv_write.write import kv_write

    cache = torch.zeros(9, 1, 2, 8, 16, 128, dtype=torch.bfloat16)
    q = torch.zeros(4, 32, 128, dtype=torch.bfloat16)
    kv_write(q[:, :8], q[:, 8:16], cache[:, 0, 0], cache[:, 0, 1], torch.zeros(4, dtype=torch.int64))


def _block_copy() -> None:
    from kernels.block_copy.copy import block_copy

    block_copy(torch.zeros(3, 2, 2, 8, 16, 128, dtype=torch.bfloat16), torch.tensor([[1, 2]]))


CASES = [
    CompileCase("kv_write bf16 8x128", _kv_write, {"_kv_write": Expectation(wide_loads=True)}),
    CompileCase("block_copy bf16", _block_copy, {"_block_copy": Expectation(wide_loads=True)}),
]
