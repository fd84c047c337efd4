"""Penalties and bias on the device, and the counts that they are made of."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kernels.sampling import reference


@pytest.fixture
def entries_of(kernels: Any, device: torch.device) -> Any:
    """Returns entries for rows of {token: count} and {token: bias}, with garbage behind those in use."""
    assert kernels.adjust_logits
    from kernels.sampling.adjust import ONLY_BIAS, Entries

    def build(rows: list[tuple[dict[int, int], dict[int, float]]], numbers: list[tuple[float, float, float]]) -> Any:
        entries = Entries.allocate(len(rows), 300, device)
        entries.tokens.fill_(2**31 - 1)
        entries.counts.fill_(77)
        entries.bias.fill_(math.nan)
        for row, (counts, bias) in enumerate(rows):
            tokens = list(counts) + [token for token in bias if token not in counts]
            entries.lengths[row] = len(tokens)
            for place, token in enumerate(tokens):
                entries.tokens[row, place] = token
                entries.counts[row, place] = counts.get(token, ONLY_BIAS)
                entries.bias[row, place] = bias.get(token, 0.0)
        entries.repetition.copy_(torch.tensor([number[0] for number in numbers]))
        entries.presence.copy_(torch.tensor([number[1] for number in numbers]))
        entries.frequency.copy_(torch.tensor([number[2] for number in numbers]))
        return entries

    return build


def test_penalties_and_bias_equal_the_reference(
    kernels: Any, device: torch.device, float_dtype: torch.dtype, entries_of: Any
) -> None:
    """A token of the prompt alone is repeated but not produced; one with a bias alone is neither."""
    logits = torch.randn(4, 500, generator=torch.Generator().manual_seed(0)).mul(3).to(float_dtype)
    rows: list[tuple[dict[int, int], dict[int, float]]] = [
        ({3: 2, 499: 0, 100: 1}, {100: 1.5, 7: -2.0}),
        ({}, {}),
        ({token: token % 3 for token in range(280)}, {}),
        ({}, {5: -math.inf}),
    ]
    numbers = [(1.5, 0.3, 0.2), (2.0, 1.0, 1.0), (0.8, -0.5, 0.1), (1.0, 0.0, 0.0)]
    found = logits.clone().to(device)
    kernels.adjust_logits(found, entries_of(rows, numbers))
    for row, ((counts, bias), penalties) in enumerate(zip(rows, numbers, strict=True)):
        expected = reference.adjust(logits[row], counts, *penalties, bias)
        near = torch.isclose(found[row].cpu().double(), expected, rtol=torch.finfo(float_dtype).eps, atol=1e-6)
        assert near.all()
        untouched = [token for token in range(500) if token not in counts and token not in bias]
        assert torch.equal(found[row].cpu()[untouched], logits[row, untouched])


def test_what_was_chosen_is_counted(kernels: Any, device: torch.device, entries_of: Any) -> None:
    """The penalties of the next step must know this step's token, without a word from the host."""
    entries = entries_of([({3: 0, 9: 2}, {4: 1.0}), ({}, {}), ({1: 1}, {}), ({}, {})], [(1.0, 0.0, 0.0)] * 4)
    for sampled in ([9, 5, -1, 0], [4, 5, 1, 0], [8, 6, -1, -1]):
        kernels.count_tokens(entries, torch.tensor(sampled, dtype=torch.int32, device=device))
    found = [
        dict(zip(entries.tokens[row, :length].tolist(), entries.counts[row, :length].tolist(), strict=True))
        for row, length in enumerate(entries.lengths.tolist())
    ]
    assert found == [{3: 0, 9: 3, 4: 1, 8: 1}, {5: 2, 6: 1}, {1: 2}, {0: 2}]
    assert entries.bias[0, :4].tolist() == [0.0, 0.0, 1.0, 0.0]


def test_a_full_row_takes_no_new_token(kernels: Any, device: torch.device, entries_of: Any) -> None:
    """One more entry would lie in the next row."""
    entries = entries_of([(dict.fromkeys(range(300), 0), {}), ({}, {})], [(1.0, 0.0, 0.0)] * 2)
    kernels.count_tokens(entries, torch.tensor([400, -1], dtype=torch.int32, device=device))
    kernels.count_tokens(entries, torch.tensor([299, -1], dtype=torch.int32, device=device))
    assert entries.lengths.tolist() == [300, 0]
    assert entries.counts[0, 299].item() == 1


def test_wrong_arguments_are_named(kernels: Any, device: torch.device, entries_of: Any) -> None:
    """A caller must learn which argument does not fit."""
    entries = entries_of([({}, {})] * 2, [(1.0, 0.0, 0.0)] * 2)
    with pytest.raises(ValueError, match=r"entries\.tokens"):
        kernels.adjust_logits(torch.zeros(3, 10, device=device), entries)
    with pytest.raises(ValueError, match="logits: dtype"):
        kernels.adjust_logits(torch.zeros(2, 10, dtype=torch.float64, device=device), entries)
    with pytest.raises(ValueError, match="sampled: dtype"):
        kernels.count_tokens(entries, torch.zeros(2, dtype=torch.int64, device=device))
