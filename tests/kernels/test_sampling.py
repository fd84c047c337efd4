"""Choosing tokens on the device: the same token as the sampler on the host, draw by draw."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from execsvc import philox
from execsvc.sampler import SamplingSpec
from execsvc.sampler import sample as host_sample
from kernels.sampling import reference, tensors
from kernels.sampling.tensors import REPORT_WORDS, REPORTED, Choice, Workspace

Rule = tuple[float, ...]
"""temperature, top_k, top_p, min_p, and typical_p if it is not 1."""


def _choice(rules: Sequence[Rule], seeds: Sequence[int], device: torch.device) -> Choice:
    temperature, top_k, top_p, min_p, typical_p = zip(*((*rule, 1.0)[:5] for rule in rules), strict=True)
    words = np.array(seeds, dtype=np.uint64).view(np.int32).reshape(-1, 2)
    return Choice(
        torch.tensor(temperature, dtype=torch.float32, device=device),
        torch.tensor(top_k, dtype=torch.int32, device=device),
        torch.tensor(top_p, dtype=torch.float32, device=device),
        torch.tensor(min_p, dtype=torch.float32, device=device),
        torch.from_numpy(words[:, 0].copy()).to(device),
        torch.from_numpy(words[:, 1].copy()).to(device),
        torch.tensor(typical_p, dtype=torch.float32, device=device),
    )


def _sample(
    kernels: Any,
    device: torch.device,
    logits: torch.Tensor,
    rules: Sequence[Rule],
    seeds: Sequence[int],
    positions: Sequence[int],
) -> list[int]:
    """Returns the tokens, one for each rule."""
    out = torch.full((len(rules),), -7, dtype=torch.int32, device=device)
    workspace = Workspace.allocate(len(rules), logits.shape[1], device)
    for field in dataclasses.fields(workspace):
        buffer = getattr(workspace, field.name)
        buffer.fill_(math.nan if buffer.dtype == torch.float32 else 2**30)
    kernels.sample(
        logits.to(device), _choice(rules, seeds, device), torch.tensor(positions, device=device), out, workspace
    )
    found: list[int] = out.tolist()
    return found


def _logits(rows: int, vocabulary: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def _host(logits: torch.Tensor, rules: Sequence[Rule], seeds: Sequence[int], positions: Sequence[int]) -> list[int]:
    # As they travel: the device has no wider ones.
    rules = [tuple(float(np.float32(value)) for value in rule) for rule in rules]
    specs = [
        SamplingSpec(temperature=t, top_k=int(k), top_p=p, min_p=m, seed=seed, typical_p=(*typical, 1.0)[0])
        for (t, k, p, m, *typical), seed in zip(rules, seeds, strict=True)
    ]
    return host_sample(logits, specs, positions)


RULES: list[Rule] = [
    (1.0, 0, 1.0, 0.0),
    (0.0, 0, 1.0, 0.0),
    (0.7, 5, 1.0, 0.0),
    (1.3, 0, 0.9, 0.0),
    (1.0, 0, 1.0, 0.05),
    (2.0, 40, 0.8, 0.01),
    (0.2, 1, 1.0, 0.0),
    (5.0, 0, 0.999, 0.0),
    (1.0, 700, 0.95, 0.0),
    (100.0, 3, 1.0, 1.0),
    (1.0, 10**6, 0.5, 0.0),
    (0.01, 0, 0.01, 0.0),
    (1.0, 0, 1.0, 0.0, 0.5),
    (0.8, 30, 0.9, 0.02, 0.7),
    (1.5, 0, 0.8, 0.0, 0.2),
    (1.0, 0, 1.0, 0.0, 1e-6),
]


@pytest.mark.parametrize("vocabulary", [1, 64, 1000])
def test_the_tokens_are_those_of_the_host(kernels: Any, device: torch.device, vocabulary: int) -> None:
    """The same seed must give the same text, wherever the choice is made; every rule, alone and together."""
    logits = _logits(len(RULES), vocabulary, seed=vocabulary)
    seeds = [2**63 + 17 * row for row in range(len(RULES))]
    positions = [5 + row * 1000 for row in range(len(RULES))]
    found = _sample(kernels, device, logits, RULES, seeds, positions)
    assert found == _host(logits, RULES, seeds, positions)


def test_likely_tokens_are_found_in_a_large_vocabulary(
    kernels: Any, watch: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only runs with likely tokens are read again; if they hold too few or too many, all must be searched."""
    monkeypatch.setattr(tensors, "CANDIDATES", 64)
    monkeypatch.setattr(tensors, "ROOM", 128)
    steep, flat = _logits(1, 1100, seed=1, spread=6.0), _logits(1, 1100, seed=2, spread=0.1)
    clustered = _logits(1, 1100, seed=3)
    clustered[0, 900:1050] += 20.0
    logits = torch.cat([steep, steep, steep, flat, flat, clustered])
    rules: list[Rule] = [(1.0, 8, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (1.0, 50, 0.9, 0.1)]
    rules += [(1.0, 0, 0.9, 0.0), (1.0, 0, 1.0, 0.95), (1.0, 40, 1.0, 0.0)]
    logits, rules = torch.cat([logits, flat, steep]), [*rules, (1.0, 0, 1.0, 0.0, 0.6), (1.0, 700, 0.99, 0.0, 0.3)]
    seeds = list(range(8))
    assert _sample(kernels, device, logits, rules, seeds, seeds) == _host(logits, rules, seeds, seeds)
    # With so little room some rows are searched again and again: what counts loads below sees it.
    assert device.type != "cpu" or watch.loaded["logits_ptr"] > 10 * logits.numel()


WIDE_VOCABULARY = 9_001
WIDE_RULES: list[Rule] = [
    (1.0, 0, 0.9, 0.0),
    (2.0, 4_000, 0.8, 0.0),
    (1.3, 8_500, 0.97, 0.004),
    (1.0, 0, 1.0, 0.0, 0.8),
    (1.0, 0, 1.0, 0.0, 0.2),
    (1.7, 6_000, 0.95, 0.0002, 0.6),
    (100.0, 0, 0.5, 0.0),
    (0.7, 300, 0.9, 0.0, 0.9),
]


def _wide_logits(kind: str) -> torch.Tensor:
    """Returns a row that makes some rule hard."""
    row = _logits(1, WIDE_VOCABULARY, seed=31)[0]
    if kind == "flat":
        return row * 0.01
    if kind == "half":
        return row.bfloat16()
    if kind == "equal":
        return torch.zeros(WIDE_VOCABULARY)
    if kind == "few values":
        return (row / 3).round()
    if kind == "forbidden":
        row[torch.arange(WIDE_VOCABULARY) % 7 > 0] = -math.inf
        return row
    if kind == "clusters":
        # Two heaps far from each other, each denser than buckets of even width could tell apart.
        return torch.where(torch.arange(WIDE_VOCABULARY) % 3 == 0, row * 1e-4, row * 1e-4 - 2.0)
    assert kind == "wide"
    return row


@pytest.mark.parametrize("kind", ["wide", "flat", "half", "equal", "few values", "forbidden", "clusters"])
def test_whatever_is_kept_a_row_is_read_three_times_at_most(
    kernels: Any, watch: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A large top_k or top_p or typical_p must not take ten times as long as a small one; nor draw another token."""
    monkeypatch.setattr(tensors, "CANDIDATES", 256)
    logits = _wide_logits(kind)[None]
    for index, rule in enumerate(WIDE_RULES):
        watch.loaded.clear()
        found = _sample(kernels, device, logits, [rule], [index], [index * 7])
        assert found == _host(logits, [rule], [index], [index * 7]), rule
        draw = float(philox.uniform(np.array([index], dtype=np.uint64), np.array([index * 7], dtype=np.uint64))[0])
        temperature, top_k, *shares = (float(np.float32(value)) for value in (*rule, 1.0)[:5])
        top_p, min_p, typical_p = shares
        exact = reference.choose(logits[0], temperature, int(top_k), top_p, min_p, draw, typical_p)
        assert found == [exact] or kind in {"half", "clusters"}, rule
        if device.type == "cpu":
            assert 0 < watch.loaded["logits_ptr"] <= 3 * WIDE_VOCABULARY, rule


def test_tokens_come_as_often_as_they_are_likely(kernels: Any, device: torch.device) -> None:
    """Otherwise samples would be from another model. 100 draws of one row, within four standard deviations."""
    row = torch.tensor([2.0, 1.0, 1.5, 0.0, -1.0, 1.0, -math.inf, 0.5])
    draws, rule = 100, (1.0, 0, 1.0, 0.0)
    found = _sample(kernels, device, row.repeat(draws, 1), [rule] * draws, [11] * draws, range(draws))
    shares = torch.softmax(row.double(), 0)
    counts = torch.bincount(torch.tensor(found), minlength=8)
    assert counts[6] == 0
    assert ((counts - draws * shares).abs() <= 4 * (draws * shares * (1 - shares)).sqrt()).all()


def test_equal_logits_are_in_the_order_of_their_tokens(kernels: Any, device: torch.device) -> None:
    """Half precision makes ties common; top_k must cut them where the host does."""
    logits = torch.zeros(6, 300)
    logits[:, 200:210] = 1.0
    rules: list[Rule] = [(1.0, 4, 1.0, 0.0), (1.0, 12, 1.0, 0.0), (1.0, 0, 0.03, 0.0)] * 2
    found = _sample(kernels, device, logits, rules, range(6), range(6))
    assert found == _host(logits, rules, range(6), range(6))
    assert all(200 <= token < 204 for token in (found[0], found[3]))


def test_company_and_dtype_of_the_buffer_change_no_token(
    kernels: Any, device: torch.device, float_dtype: torch.dtype
) -> None:
    """A row alone, in a batch, in another order: the same token; in every type that logits may have."""
    logits = _logits(6, 500, seed=4).to(float_dtype)
    rules = [RULES[row] for row in (0, 3, 4, 5, 8, 1)]
    seeds, positions = list(range(6)), [3, 2**40, 0, 9, 2**31, 1]
    together = _sample(kernels, device, logits, rules, seeds, positions)
    assert together == _host(logits, rules, seeds, positions)
    padded = torch.full((6, 700), math.nan, dtype=float_dtype)
    padded[:, :500] = logits
    for row in (1, 4):
        alone = _sample(kernels, device, padded[row : row + 1, :500], [rules[row]], [seeds[row]], [positions[row]])
        assert alone == [together[row]]


def test_logits_that_are_not_finite_give_no_token(kernels: Any, device: torch.device) -> None:
    """A broken sequence must end with an error and not stream noise; -inf alone is a withheld token."""
    logits = _logits(5, 300, seed=5)
    logits[0, 250] = math.nan
    logits[1, 3] = math.inf
    logits[2] = -math.inf
    logits[3, :299] = -math.inf
    for rule in ((1.0, 0, 1.0, 0.0), (1.0, 9, 0.9, 0.0), (0.0, 0, 1.0, 0.0)):
        found = _sample(kernels, device, logits, [rule] * 5, range(5), range(5))
        assert found[:4] == [-1, -1, -1, 299]
        assert found[4] >= 0
    out, workspace = torch.zeros(5, dtype=torch.int32, device=device), Workspace.allocate(5, 300, device)
    kernels.most_likely(logits.to(device), out, workspace)
    assert out.tolist() == [-1, -1, -1, 299, int(logits[4].argmax())]


def test_the_most_likely_token_is_the_first_of_equals(kernels: Any, device: torch.device) -> None:
    """Greedy text must not depend on how the vocabulary is cut into runs."""
    logits = torch.zeros(3, 1000, dtype=torch.bfloat16)
    logits[1, 700] = logits[1, 300] = 5.0
    logits[2, 999] = 0.5
    out, workspace = torch.zeros(3, dtype=torch.int32, device=device), Workspace.allocate(3, 1000, device)
    kernels.most_likely(logits.to(device), out, workspace)
    assert out.tolist() == [0, 300, 999]


def test_log_probabilities_are_those_of_the_model(kernels: Any, device: torch.device, float_dtype: torch.dtype) -> None:
    """Users compare them between requests: sorted, ties by token, -1 where there are no more; ranks as of a sort."""
    logits = _logits(6, 700, seed=6)
    logits[1, 100:400] = 7.5
    logits[2, 3:] = -math.inf
    logits = logits.to(float_dtype)
    tokens, counts = [5, 200, 1, 699, -1, 7], [5, 20, 5, 0, 3, -1]
    reports = torch.full((6, REPORT_WORDS), 12345, dtype=torch.int32, device=device)
    words = [torch.tensor(column, dtype=torch.int32, device=device) for column in (tokens, counts)]
    kernels.report(logits.to(device), *words, reports, Workspace.allocate(6, 700, device))
    for row, (token, count) in enumerate(zip(tokens, counts, strict=True)):
        if token < 0 or count < 0:
            assert (reports[row] == 12345).all()
            continue
        found, values = reports[row].cpu(), reports[row].cpu().view(torch.float32)
        rank, logarithm, most, theirs = reference.report(logits[row], token, count)
        known = min(count, 3 if row == 2 else count)
        assert found[0] == rank
        assert values[1].item() == pytest.approx(logarithm, abs=1e-5)
        assert found[2 : 2 + count].tolist() == most[:known] + [-1] * (count - known)
        listed = values[2 + REPORTED : 2 + REPORTED + known].tolist()
        assert listed == pytest.approx(theirs[:known], abs=1e-5)


def test_the_random_numbers_are_those_of_the_host() -> None:
    """The reference draws with the host's numbers; this ties the two together for large seeds and positions."""
    draws = philox.uniform(np.array([2**64 - 1, 5], dtype=np.uint64), np.array([2**40, 0], dtype=np.uint64))
    logits = _logits(1, 50, seed=8)
    specs = [SamplingSpec(1.0, seed=seed) for seed in (2**64 - 1, 5)]
    by_host = host_sample(logits.repeat(2, 1), specs, [2**40, 0])
    assert [reference.choose(logits[0], 1.0, 0, 1.0, 0.0, draw) for draw in draws.tolist()] == by_host


def test_wrong_arguments_are_named(kernels: Any, device: torch.device) -> None:
    """A caller must learn which argument does not fit, before anything is written."""
    logits, out = torch.zeros(2, 200, device=device), torch.zeros(2, dtype=torch.int32, device=device)
    workspace = Workspace.allocate(2, 200, device)
    choice, positions = _choice(RULES[:2], [0, 1], device), torch.zeros(2, dtype=torch.int32, device=device)
    wrong: list[tuple[str, Any]] = [
        ("logits: dtype", lambda: kernels.most_likely(logits.double(), out, workspace)),
        ("logits: at least one column", lambda: kernels.most_likely(logits[:, :0], out, workspace)),
        ("out: shape", lambda: kernels.most_likely(logits, out[:1], workspace)),
        ("workspace.heads", lambda: kernels.most_likely(logits[:, :100], out, workspace)),
        ("workspace: at least 2 rows", lambda: kernels.most_likely(logits, out, Workspace.allocate(1, 200, device))),
        ("positions", lambda: kernels.sample(logits, choice, positions[:1], out, workspace)),
        (
            "choice.temperature",
            lambda: kernels.sample(logits, _choice(RULES, range(len(RULES)), device), positions, out, workspace),
        ),
        ("counts: shape", lambda: kernels.report(logits, out, out[:1], out[:, None], workspace)),
        ("reports: shape", lambda: kernels.report(logits, out, out, out[:, None], workspace)),
    ]
    for message, call in wrong:
        with pytest.raises(ValueError, match=message):
            call()
