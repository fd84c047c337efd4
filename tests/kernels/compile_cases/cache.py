"""Launches of the kernels that move keys and values, at the shapes of an 8B model."""

from __future__ import annotations

import functools

import torch

from tests.kernels.compile_gate import CompileCase, Expectation

FLOAT8_TARGETS = (90, 100)
"""sm_80 has no float8."""


def _cache(dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(3, 2, 2, 8, 16, 128).to(dtype)


def _kv_write(dtype: torch.dtype) -> None:
    from kernels.kv_write.write import kv_write

    cache = _cache(dtype)
    q = torch.zeros(4, 32, 128, dtype=torch.bfloat16)
    kv_write(q[:, :8], q[:, 8:16], cache[:, 0, 0], cache[:, 0, 1], torch.zeros(4, dtype=torch.int64))


def _rotate_and_write(dtype: torch.dtype) -> None:
    from kernels.kv_write.rotate_write import rotate_and_write

    cache, heads = _cache(dtype), torch.zeros(4, 48, 128, dtype=torch.bfloat16)
    positions = slots = torch.zeros(4, dtype=torch.int64)
    table = torch.zeros(64, 64)
    rotate_and_write(heads, table, table, positions, cache[:, 0, 0], cache[:, 0, 1], slots)


def _move_blocks() -> None:
    from kernels.block_copy.copy import block_copy
    from kernels.block_swap.swap import gather_blocks, scatter_blocks

    cache = _cache(torch.bfloat16)
    block_copy(cache, torch.tensor([[1, 2]]))
    gather_blocks(cache, torch.tensor([1]), cache[2:])
    scatter_blocks(cache[2:], cache, torch.tensor([1]))


_WIDE = Expectation(wide_loads=True)
CASES = [
    CompileCase("kv_write bf16 8x128", functools.partial(_kv_write, torch.bfloat16), {"_kv_write": _WIDE}),
    CompileCase(
        "kv_write bf16 to e4m3 8x128",
        functools.partial(_kv_write, torch.float8_e4m3fn),
        {"_kv_write": Expectation()},
        FLOAT8_TARGETS,
    ),
    CompileCase(
        "rotate_and_write bf16 32/8x128",
        functools.partial(_rotate_and_write, torch.bfloat16),
        {"_rotate_and_write": _WIDE},
    ),
    CompileCase(
        "rotate_and_write bf16 to e4m3 32/8x128",
        functools.partial(_rotate_and_write, torch.float8_e4m3fn),
        {"_rotate_and_write": Expectation()},
        FLOAT8_TARGETS,
    ),
    CompileCase("block moves", _move_blocks, {"_move_blocks": _WIDE}),
]
