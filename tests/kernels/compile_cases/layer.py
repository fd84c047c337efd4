"""Launches of what lies between the projections of a layer, at the shapes of an 8B model."""

from __future__ import annotations

import torch

from tests.kernels.compile_gate import CompileCase, Expectation


def _norms() -> None:
    from kernels.rms_norm.norm import add_rms_norm, rms_norm

    rows, weight = torch.zeros(4, 4096, dtype=torch.bfloat16), torch.zeros(4096, dtype=torch.bfloat16)
    rms_norm(rows, weight, 1e-5)
    add_rms_norm(rows, rows.clone(), weight, 1e-5)
    rms_norm(rows.view(4, 32, 128), weight[:128], 1e-5)


def _gate() -> None:
    from kernels.silu_mul.gate import silu_mul

    silu_mul(torch.zeros(4, 28672, dtype=torch.bfloat16))


def _rotate() -> None:
    from kernels.rotary.rotate import rotate

    table = torch.zeros(64, 64)
    rotate(torch.zeros(4, 40, 128, dtype=torch.bfloat16), table, table, torch.zeros(4, dtype=torch.int64))


_WIDE = Expectation(wide_loads=True)
CASES = [
    CompileCase("rms_norm bf16", _norms, {"_rms_norm": _WIDE}),
    CompileCase("silu_mul bf16 14336", _gate, {"_silu_mul": _WIDE}),
    CompileCase("rotate bf16 40x128", _rotate, {"_rotate": _WIDE}),
]
