"""Draws are functions of seed, position and logits, and follow the distribution asked for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from execsvc.philox import philox4x32, uniform
from execsvc.sampler import SamplingSpec, sample
from quire.errors import InvalidRequestError

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0, 0.0])


def draws(spec: SamplingSpec, count: int, logits: torch.Tensor = LOGITS) -> list[int]:
    """Returns draws at positions 0 .. count - 1."""
    return sample(logits.expand(count, -1), [spec] * count, list(range(count)))


def test_philox_gives_the_published_words() -> None:
    """Otherwise another implementation could not draw the same tokens. Vectors: Random123 kat_vectors."""
    one = np.array([0xFFFFFFFF], dtype=np.uint64)
    zero = np.zeros(1, dtype=np.uint64)
    words = [int(word[0]) for word in philox4x32((zero, zero, zero, zero), (zero, zero))]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    words = [int(word[0]) for word in philox4x32((one, one, one, one), (one, one))]
    assert words == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_uniform_numbers_are_uniform_and_below_one() -> None:
    """Otherwise samples would be skewed, or the draw would fall off the end."""
    numbers = uniform(np.full(20_000, 2**63 + 5, dtype=np.uint64), np.arange(20_000, dtype=np.uint64))
    assert 0.0 <= numbers.min() < 0.001
    assert 0.999 < numbers.max() < 1.0
    assert abs(numbers.mean() - 0.5) < 0.01


def test_temperature_zero_takes_the_first_of_the_most_likely() -> None:
    """Otherwise greedy answers would not be repeatable."""
    assert sample(torch.tensor([[0.0, 5.0, 5.0]]), [SamplingSpec()], [0]) == [1]


def test_the_frequencies_are_those_of_the_softmax() -> None:
    """Otherwise temperature would mean something else than everywhere."""
    counts = np.bincount(draws(SamplingSpec(temperature=2.0, seed=3), 20_000), minlength=5) / 20_000
    assert np.abs(counts - torch.softmax(LOGITS / 2.0, -1).numpy()).max() < 0.012


@pytest.mark.parametrize(
    ("spec", "allowed"),
    [
        (SamplingSpec(temperature=5.0, top_k=2), {1, 2}),
        (SamplingSpec(temperature=1.0, top_p=0.7), {1, 2}),
        (SamplingSpec(temperature=1.0, top_p=1e-6), {1}),
        (SamplingSpec(temperature=1.0, min_p=0.2), {1, 2}),
        (SamplingSpec(temperature=1.0, min_p=1.0), {1}),
        (SamplingSpec(temperature=9.0, top_k=3, top_p=0.99, min_p=0.5), {1, 2, 0}),
        (SamplingSpec(temperature=9.0, top_k=99), {0, 1, 2, 3, 4}),
    ],
)
def test_unlikely_tokens_are_dropped(spec: SamplingSpec, allowed: set[int]) -> None:
    """Otherwise top_k, top_p and min_p would not do what users know them for."""
    assert set(draws(spec, 2000)) == allowed


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 7},
        {"top_k": 1500},
        {"top_p": 0.3},
        {"top_p": 0.999},
        {"min_p": 0.3},
        {"min_p": 1e-9},
        {"top_k": 99999},
    ],
)
def test_a_large_vocabulary_is_not_cut_short(options: dict[str, float]) -> None:
    """Otherwise looking at the most likely tokens first would change who can be drawn."""
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(5)) * 3
    spec = SamplingSpec(temperature=1.5, seed=4, **options)  # type: ignore[arg-type]
    weights, order = torch.sort(torch.softmax(logits.double() / 1.5, -1), descending=True)
    kept = torch.arange(3000) < (spec.top_k or 3000)
    weights = weights * kept / (weights * kept).sum()
    weights = weights * ((weights.cumsum(-1) - weights) < spec.top_p) * (weights >= spec.min_p * weights[0])
    allowed = order[weights > 0].tolist()
    drawn = draws(spec, 3000, logits)
    assert set(drawn) <= set(allowed)
    likely = weights[: len(allowed)] / weights.sum()
    assert abs(drawn.count(allowed[0]) / 3000 - float(likely[0])) < 0.03


def test_a_draw_depends_on_seed_and_position_only() -> None:
    """Otherwise the same seed would give another text on a busy server, or after a preemption."""
    logits = torch.randn(6, 1000, generator=torch.Generator().manual_seed(1))
    specs = [SamplingSpec(1.3, seed=seed, top_p=top_p) for seed, top_p in enumerate((1.0, 0.9, 1.0, 0.5, 0.99, 1.0))]
    positions = [5, 900, 0, 17, 3, 2**40]
    together = sample(logits, specs, positions)
    alone = [sample(logits[row : row + 1], [specs[row]], [positions[row]])[0] for row in range(6)]
    assert together == alone
    assert sample(logits.flip(0), specs[::-1], positions[::-1]) == together[::-1]
    assert len({tuple(draws(SamplingSpec(1.0, seed=seed), 30)) for seed in range(5)}) == 5


def test_logits_that_are_not_finite_give_no_token() -> None:
    """Otherwise a broken sequence would stream noise."""
    logits = torch.stack([LOGITS, torch.full_like(LOGITS, math.nan), LOGITS])
    assert sample(logits, [SamplingSpec()] * 3, [0, 0, 0]) == [1, -1, 1]


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -0.1), ("temperature", 101.0), ("temperature", math.inf), ("top_p", 1.5), ("min_p", -0.1)],
)
def test_values_out_of_range_name_the_field(field: str, value: float) -> None:
    """Otherwise a user would not know what to correct."""
    with pytest.raises(InvalidRequestError, match=field):
        SamplingSpec(**{"temperature": 1.0, field: value})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_withheld_tokens_are_not_chosen_before_their_position(temperature: float) -> None:
    """An answer that must have some length must not be cut short, and must not be bent after that."""
    spec = SamplingSpec(temperature=temperature, top_k=3, seed=5, withheld=(1, 2), withheld_until=40)
    free = SamplingSpec(temperature=temperature, top_k=3, seed=5)
    mixed = sample(LOGITS.expand(80, -1), [spec, free] * 40, [position // 2 + 20 for position in range(80)])
    assert {1, 2}.isdisjoint(mixed[0:40:2])
    assert mixed[40::2] == mixed[41::2]
    assert set(mixed[1::2]) & {1, 2}
    assert LOGITS.tolist() == [1.0, 3.0, 2.0, -1.0, 0.0]


def test_the_others_are_drawn_as_if_withheld_tokens_did_not_exist() -> None:
    """Probabilities are those of the tokens that are left, whatever the dropped ones weighed."""
    spec = SamplingSpec(temperature=1.0, seed=3, withheld=(1,), withheld_until=1 << 20)
    counts = np.bincount(draws(spec, 20_000), minlength=5) / 20_000
    expected = torch.softmax(torch.tensor([1.0, -math.inf, 2.0, -1.0, 0.0]), -1).numpy()
    assert np.abs(counts - expected).max() < 0.012


def test_with_everything_withheld_nothing_is_chosen() -> None:
    """There is no answer then; a token out of thin air would be a wrong one."""
    spec = SamplingSpec(withheld=(0, 1, 2, 3, 4), withheld_until=9)
    assert sample(LOGITS[None], [spec], [3]) == [-1]


def test_of_equal_logits_the_first_tokens_are_kept() -> None:
    """Otherwise which of them may be drawn depends on how a library selects: another on each device."""
    logits = torch.zeros(1, 5000)
    logits[0, 4000:4500] = 1.0
    specs = [SamplingSpec(temperature=1.0, top_k=count, seed=count) for count in (3, 600, 1024)]
    for spec in specs:
        drawn = set(sample(logits.expand(100, -1), [spec] * 100, list(range(100))))
        assert drawn <= {*range(4000, 4000 + min(spec.top_k, 500)), *range(max(0, spec.top_k - 500))}
