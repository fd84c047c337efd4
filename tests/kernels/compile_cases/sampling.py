"""Launches of the sampling kernels, at the vocabulary of an 8B model."""

from __future__ import annotations

import torch

from tests.kernels.compile_gate import CompileCase, Expectation

VOCABULARY = 128256


def _sample() -> None:
    from kernels.sampling.choose import most_likely, sample
    from kernels.sampling.tensors import Choice, LogProbabilities, Workspace

    device = torch.device("cpu")
    logits = torch.zeros(2, VOCABULARY, dtype=torch.bfloat16)
    workspace = Workspace.allocate(2, VOCABULARY, device)
    floats, integers = torch.ones(2), torch.zeros(2, dtype=torch.int32)
    choice = Choice(floats, integers, floats, floats, integers, integers)
    most_likely(logits, integers, workspace)
    sample(logits, choice, integers, integers, workspace, LogProbabilities.allocate(2, 20, device))


def _adjust() -> None:
    from kernels.sampling.adjust import Entries, adjust_logits, count_tokens

    entries = Entries.allocate(2, 4096, torch.device("cpu"))
    adjust_logits(torch.zeros(2, VOCABULARY, dtype=torch.bfloat16), entries)
    count_tokens(entries, torch.zeros(2, dtype=torch.int32))


CASES = [
    CompileCase("sampling bf16 128256", _sample, {"_scan": Expectation(), "_choose": Expectation()}),
    CompileCase("penalties bf16 128256", _adjust, {"_adjust": Expectation(), "_count": Expectation()}),
]
