"""Launches of the sampling kernels, at the vocabulary of an 8B model."""

from __future__ import annotations

from typing import Any

import torch

from tests.kernels.compile_gate import CompileCase, Expectation

VOCABULARY = 128256


def _choice() -> Any:
    from kernels.sampling.tensors import Choice

    floats, integers = torch.ones(2), torch.zeros(2, dtype=torch.int32)
    return Choice(floats, integers, floats, floats, integers, integers, floats)


def _sample() -> None:
    from kernels.sampling.choose import most_likely, report, sample
    from kernels.sampling.tensors import REPORT_WORDS, Workspace

    logits = torch.zeros(2, VOCABULARY, dtype=torch.bfloat16)
    workspace = Workspace.allocate(2, VOCABULARY, torch.device("cpu"))
    integers = torch.zeros(2, dtype=torch.int32)
    most_likely(logits, integers, workspace)
    sample(logits, _choice(), integers, integers, workspace)
    report(logits, integers, integers, torch.zeros(2, REPORT_WORDS, dtype=torch.int32), workspace)


def _change() -> None:
    from kernels.sampling.change import change_logits, note_tokens
    from kernels.sampling.choose import sample
    from kernels.sampling.tensors import Changes, Penalties, Workspace

    logits = torch.zeros(2, VOCABULARY, dtype=torch.bfloat16)
    workspace = Workspace.allocate(2, VOCABULARY, torch.device("cpu"), changes=True)
    integers, floats = torch.zeros(2, dtype=torch.int32), torch.ones(2)
    penalties = Penalties(floats, floats, floats, integers)
    for dtype in (torch.int16, torch.int32):
        seen = torch.zeros(2, VOCABULARY, dtype=dtype)
        entries, masks = torch.zeros(2, 2048, dtype=torch.int32), torch.zeros(4, VOCABULARY // 32, dtype=torch.int32)
        changes = Changes(seen, entries, entries.float(), integers, integers, integers, masks)
        changed = change_logits(logits, changes, penalties, floats, integers, workspace)
        note_tokens(seen, integers, integers, penalties)
    sample(changed, _choice(), integers, integers, workspace, scanned=True)


CASES = [
    CompileCase(
        "sampling bf16 128256",
        _sample,
        {"_scan": Expectation(), "_choose": Expectation(), "_choose_in_row": Expectation(), "_report": Expectation()},
    ),
    CompileCase("changed bf16 128256", _change, {"_change": Expectation(), "_note": Expectation()}),
]
