"""Launches of a step's state, with the rows and tables of a server of an 8B model."""

from __future__ import annotations

import torch

from tests.kernels.compile_gate import CompileCase, Expectation

_CPU = torch.device("cpu")


def _step() -> None:
    from kernels.step_state.state import advance, apply_writes, stage_decode
    from kernels.step_state.tensors import Resident, Staged

    resident, staged = Resident.allocate(256, 2048, _CPU), Staged.allocate(8, 2048, _CPU)
    words = torch.zeros(8, dtype=torch.int32)
    apply_writes(resident.state, words, words)
    stage_decode(resident, words, staged, 16)
    advance(resident, words, staged.lens, words, words)


CASES = [
    CompileCase(
        "step state 256x2048",
        _step,
        {"_apply_writes": Expectation(), "_stage_decode": Expectation(), "_advance": Expectation()},
    ),
]
