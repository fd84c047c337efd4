"""What changes logits on the device: the bits of the host, and the state that it is made of."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from execsvc.choosing import change_logits as host_change
from execsvc.sampler import SamplingSpec
from kernels.sampling import reference
from kernels.sampling.tensors import WITHHELD, Changes, Penalties, Workspace

VOCABULARY = 700


@dataclasses.dataclass
class Place:
    """One place of a batch, as the host knows it."""

    prompt: list[int] = dataclasses.field(default_factory=list)
    produced: list[int] = dataclasses.field(default_factory=list)
    bias: dict[int, float] = dataclasses.field(default_factory=dict)
    withheld: tuple[int, ...] = ()
    allowed: list[int] | None = None
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    withheld_until: int = 0

    @property
    def spec(self) -> SamplingSpec:
        """The same as the host is asked."""
        return SamplingSpec(
            bias=tuple(self.bias.items()),
            repetition_penalty=self.repetition,
            frequency_penalty=self.frequency,
            presence_penalty=self.presence,
            prompt_token_count=len(self.prompt),
        )


PLACES = [
    Place([3, 499, 100, 3], [100, 3, 3], {100: 1.5, 7: -2.0, 699: 4.0}, (), None, 1.3, 0.7, 0.3),
    Place([1, 2], [3]),
    Place(list(range(0, 600, 2)), list(range(300)) * 2, {}, (0, 64, 65, 699), None, 0.8, 0.1, -0.5, 1000),
    Place([], [], {5: -math.inf, 64: 3.25}, (5, 6), None, withheld_until=3),
    Place([9], [9], dict.fromkeys(range(0, 700, 2), 0.1), (8, 9), [8, 9, 10, 350, 699], 2.0, withheld_until=4),
]
POSITIONS = [7, 3, 900, 3, 2]


def _seen(place: Place) -> torch.Tensor:
    seen = torch.zeros(VOCABULARY, dtype=torch.int64)
    seen[place.prompt] = 1
    return seen + 2 * torch.bincount(torch.tensor(place.produced, dtype=torch.int64), minlength=VOCABULARY)


def _device_state(places: list[Place], device: torch.device, dtype: torch.dtype) -> tuple[Changes, Penalties]:
    """Returns the state of `places` in rows that are in another order, with garbage behind entries in use."""
    count = len(places)
    rows = list(reversed(range(count)))
    seen = torch.full((count + 1, VOCABULARY), 9, dtype=dtype)
    tokens = torch.full((count + 1, 400), 2**31 - 1, dtype=torch.int32)
    bias = torch.full((count + 1, 400), math.nan)
    counts = torch.full((count + 1,), 400, dtype=torch.int32)
    masks = torch.zeros(2, -(-VOCABULARY // 32), dtype=torch.int32)
    mask_places = torch.full((count,), -1, dtype=torch.int32)
    for index, place in enumerate(places):
        row, named = rows[index], sorted({*place.bias, *place.withheld})
        seen[row] = _seen(place)
        counts[row] = len(named)
        for entry, token in enumerate(named):
            tokens[row, entry] = token + (WITHHELD if token in place.withheld else 0)
            bias[row, entry] = place.bias.get(token, 0.0)
        if place.allowed is not None:
            bits = np.zeros(masks.shape[1] * 32, dtype=np.uint8)
            bits[place.allowed] = 1
            masks[1] = torch.from_numpy(np.packbits(bits, bitorder="little").view(np.int32).copy())
            mask_places[index] = 1
    states = [seen, tokens, bias, counts, torch.tensor(rows, dtype=torch.int32), mask_places, masks]
    numbers = torch.tensor([[place.repetition, place.frequency, place.presence] for place in places]).T.contiguous()
    until = torch.tensor([place.withheld_until for place in places], dtype=torch.int32)
    penalties = [*numbers, until]
    return Changes(*(state.to(device) for state in states)), Penalties(*(column.to(device) for column in penalties))


def _expected(logits: torch.Tensor, place: Place, position: int) -> torch.Tensor:
    """Returns one row as the host's rules change it."""
    row = logits.float().clone()
    if place.allowed is not None:
        allowed = torch.zeros(VOCABULARY, dtype=torch.bool)
        allowed[place.allowed] = True
        row[~allowed] = -math.inf
    tokens = np.array([*place.prompt, *place.produced], dtype=np.int64)
    host_change(row, place.spec if place.bias or place.spec.penalizes else SamplingSpec(), tokens, len(tokens))
    if position < place.withheld_until:
        row[list(place.withheld)] = -math.inf
    return row


@pytest.mark.parametrize("seen_dtype", [torch.int16, torch.int32], ids=["int16", "int32"])
def test_the_changed_logits_have_the_bits_of_the_host(
    kernels: Any, device: torch.device, float_dtype: torch.dtype, seen_dtype: torch.dtype
) -> None:
    """Penalties, bias, withheld tokens, a grammar: another last bit could be another token of a greedy text."""
    places = [
        dataclasses.replace(place, bias={t: b for t, b in place.bias.items() if math.isfinite(b)}) for place in PLACES
    ]
    logits = torch.randn(len(places), VOCABULARY, generator=torch.Generator().manual_seed(0)).mul(3).to(float_dtype)
    changes, penalties = _device_state(places, device, seen_dtype)
    workspace = Workspace.allocate(len(places), VOCABULARY, device, changes=True)
    temperature = torch.tensor([1.0, 0.0, 0.7, 2.0, 1.0], device=device)
    given = logits.clone().to(device)
    positions = torch.tensor(POSITIONS, device=device)
    found = kernels.change_logits(given, changes, penalties, temperature, positions, workspace)
    assert torch.equal(given.cpu(), logits)
    for row, (place, position) in enumerate(zip(places, POSITIONS, strict=True)):
        expected = _expected(logits[row], place, position)
        assert torch.equal(found[row].cpu(), expected), row
        impossible = [token for token in range(VOCABULARY) if expected[token] == -math.inf]
        exact = reference.change(
            logits[row], _seen(place), place.repetition, place.presence, place.frequency, place.bias, impossible
        )
        assert torch.allclose(found[row].cpu().double(), exact, rtol=1e-6, atol=1e-5)


def test_the_scan_of_changed_logits_is_that_of_a_choice(kernels: Any, device: torch.device) -> None:
    """A choice that trusts it must draw what it draws from the same logits, given as they are; and so must a report."""
    from kernels.sampling.tensors import REPORT_WORDS, Choice

    logits = torch.randn(len(PLACES), VOCABULARY, generator=torch.Generator().manual_seed(1)).mul(3)
    changes, penalties = _device_state(PLACES, device, torch.int32)
    workspace = Workspace.allocate(len(PLACES), VOCABULARY, device, changes=True)
    temperature = torch.tensor([1.0, 0.0, 0.7, 2.0, 1.0], device=device)
    words = torch.tensor([5, 0, 0, 20, 3], dtype=torch.int32, device=device)
    ones = torch.ones(5, device=device)
    choice = Choice(temperature, words, 0.9 * ones, 0.0 * ones, words, words, ones)
    positions = torch.tensor(POSITIONS, device=device)
    found, again = (torch.zeros(5, dtype=torch.int32, device=device) for _ in range(2))
    changed = kernels.change_logits(logits.to(device), changes, penalties, temperature, positions, workspace)
    kernels.sample(changed, choice, positions, found, workspace, scanned=True)
    kernels.sample(changed, choice, positions, again, Workspace.allocate(5, VOCABULARY, device))
    assert found.tolist() == again.tolist()
    reports, others = (torch.zeros(5, REPORT_WORDS, dtype=torch.int32, device=device) for _ in range(2))
    from kernels.sampling.logprobs import write_reports

    write_reports(logits.to(device), found, words, workspace.plain_heads, workspace.plain_masses, reports)
    kernels.report(logits.to(device), found, words, others, workspace)
    assert torch.equal(reports, others)


def test_padding_takes_nothing_of_the_row_it_reads(kernels: Any, device: torch.device) -> None:
    """Else its logits would be those of another sequence, and a NaN there would be one here."""
    logits = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(2))
    changes, penalties = _device_state(PLACES, device, torch.int16)
    changes.rows.fill_(-1)
    changes.mask_places.fill_(-1)
    workspace = Workspace.allocate(5, VOCABULARY, device, changes=True)
    positions = torch.tensor(POSITIONS, device=device)
    found = kernels.change_logits(
        logits.to(device), changes, penalties, torch.ones(5, device=device), positions, workspace
    )
    assert torch.equal(found.cpu(), logits)


@pytest.mark.parametrize("seen_dtype", [torch.int16, torch.int32], ids=["int16", "int32"])
def test_what_was_chosen_is_counted(kernels: Any, device: torch.device, seen_dtype: torch.dtype) -> None:
    """The penalties of the next step must know this step's token, without a word from the host."""
    changes, penalties = _device_state(PLACES, device, seen_dtype)
    before = changes.seen.clone().cpu()
    rows = torch.tensor([4, 3, -1, 1, 0], dtype=torch.int32, device=device)
    for sampled in ([9, 5, 1, 0, 699], [9, 6, -1, -1, -1]):
        kernels.note_tokens(changes.seen, rows, torch.tensor(sampled, dtype=torch.int32, device=device), penalties)
    # Places 1 and 3 have no penalties, place 2 is padding.
    before[4, 9] += 4
    before[0, 699] += 2
    assert torch.equal(changes.seen.cpu(), before)


def test_wrong_arguments_are_named(kernels: Any, device: torch.device) -> None:
    """A caller must learn which argument does not fit."""
    changes, penalties = _device_state(PLACES, device, torch.int16)
    workspace = Workspace.allocate(5, VOCABULARY, device, changes=True)
    logits, ones = torch.zeros(5, VOCABULARY, device=device), torch.ones(5, device=device)
    positions = torch.zeros(5, dtype=torch.int32, device=device)
    wrong: list[tuple[str, Any, Any]] = [
        ("workspace.changed: shape", changes, Workspace.allocate(5, VOCABULARY, device)),
        ("changes.rows: shape", dataclasses.replace(changes, rows=changes.rows[:4]), workspace),
        ("changes.seen: dtype", dataclasses.replace(changes, seen=changes.seen.long()), workspace),
        ("changes.masks: a bit for each", dataclasses.replace(changes, masks=changes.masks[:, :21]), workspace),
    ]
    for message, state, room in wrong:
        with pytest.raises(ValueError, match=message):
            kernels.change_logits(logits, state, penalties, ones, positions, room)
    with pytest.raises(ValueError, match="logits: dtype"):
        kernels.change_logits(logits.double(), changes, penalties, ones, positions, workspace)
    with pytest.raises(ValueError, match=r"penalties\.repetition: shape"):
        kernels.note_tokens(changes.seen, positions[:4], positions[:4], penalties)
