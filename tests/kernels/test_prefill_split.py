"""Few queries over long contexts, shared out over a fixed grid, against the reference in float64."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from tests.kernels.attention_case import make_case, outputs, prefill

FLOAT8 = torch.float8_e4m3fn


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_a_turn_on_a_long_context_is_shared_out(
    kernels: Any, float_dtype: torch.dtype, workers: int, device: torch.device
) -> None:
    """One part, parts that end inside an item, more workers than tiles; beside it sequences with one query or none."""
    case = make_case([300, 40, 130, 1], [17, 0, 3, 1], float_dtype, heads=(2, 1), device=device)
    case.check(*prefill(kernels, case, lse=True, workers=workers))


@pytest.mark.parametrize("heads", [(2, 2), (5, 1), (48, 1), (96, 1)])
def test_with_any_group_of_heads(kernels: Any, heads: tuple[int, int], device: torch.device) -> None:
    """The rows of an item are tokens times heads: a token may be cut between two items."""
    case = make_case([150, 30], [7, 3], torch.float16, heads=heads, device=device)
    case.check(*prefill(kernels, case, lse=True, workers=3))


@pytest.mark.parametrize("window", [1, 40, 64, 200])
def test_windows_begin_where_each_item_s_first_row_looks(kernels: Any, window: int, device: torch.device) -> None:
    """Tiles before every row's window are no work, and rows of one item see different ones."""
    case = make_case([290, 90], [50, 20], heads=(2, 1), window=window, device=device)
    case.check(*prefill(kernels, case, lse=True, workers=4))


@pytest.mark.parametrize("seed", range(5))
def test_with_chance_choosing_everything(kernels: Any, seed: int, device: torch.device) -> None:
    """Features that work alone may not work together."""
    chance = random.Random(seed)
    heads = chance.choice([(2, 1), (3, 1), (4, 2)])
    dtype = chance.choice([torch.float32, torch.float16, torch.bfloat16])
    counts = [chance.choice([0, 1, chance.randrange(1, 40)]) for _ in range(3)]
    case = make_case(
        [count + chance.choice([0, chance.randrange(200)]) for count in counts], counts, dtype,
        kv_dtype=FLOAT8 if dtype != torch.float32 and chance.random() < 0.5 else None, heads=heads,
        head_dim=chance.choice([64, 80, 128]), block_size=chance.choice([16, 32, 64]),
        token_major=chance.random() < 0.5, seed=seed, device=device, window=chance.choice([0, 0, 50, 64]),
        soft_cap=chance.choice([0.0, 5.0]), sinks=chance.choice([None, torch.randn(heads[0], device=device)]),
        k_scale=2.0, v_scale=0.5,
    )  # fmt: skip
    case.check(*prefill(kernels, case, lse=True, workers=chance.choice([1, 3, 5])))


def test_one_workspace_serves_one_step_after_another(kernels: Any, device: torch.device) -> None:
    """What a longer step left in it must not come back; a step with many row blocks goes without."""
    from kernels.paged_attention.prefill_split import PrefillWorkspace

    cases = [make_case([length, 70], [count, 5], heads=(2, 1), device=device, seed=length)
             for length, count in ((250, 40), (90, 2), (150, 130), (200, 9))]  # fmt: skip
    workspace = PrefillWorkspace(cases[0].shape, torch.float32, device, workers=3, item_max=8)
    fits = []
    for case in cases:
        fits.append(workspace.fits(len(case.q), 2))
        workspace.refresh(case.context_lens, case.query_starts, len(case.q))
        out = outputs(case)[0]
        kernels.prefill(
            case.q, case.k_cache, case.v_cache, case.block_tables, case.context_lens, case.query_starts,
            case.options, workspace, out=out,
        )  # fmt: skip
        case.check(out)
    assert fits == [True, True, False, True]


def test_a_workspace_for_something_else_is_refused(kernels: Any, device: torch.device) -> None:
    """Scratch of other heads would be written past its end."""
    from kernels.paged_attention.prefill_split import PrefillWorkspace

    case = make_case([40], [3], heads=(4, 2), device=device)
    arguments = [
        case.q, case.k_cache, case.v_cache, case.block_tables, case.context_lens, case.query_starts, case.options
    ]  # fmt: skip
    shape = dataclasses.replace(case.shape, num_kv_heads=1)
    with pytest.raises(ValueError, match="heads"):
        kernels.prefill(*arguments, PrefillWorkspace(shape, torch.float32, device))
    with pytest.raises(ValueError, match="window"):
        kernels.prefill(*arguments, PrefillWorkspace(case.shape, torch.float32, device, windows=(7,)))
    with pytest.raises(ValueError, match="query_starts"):
        PrefillWorkspace(case.shape, torch.float32, device).refresh(case.context_lens, case.query_starts[:1], 3)


def test_who_looks_too_far_is_caught(kernels: Any, device: torch.device) -> None:
    """Negative control: a length that is one too long reads poison, or the other tests would prove nothing."""
    case = make_case([120], [5], heads=(2, 1), device=device)
    case.context_lens += 1
    assert not torch.isfinite(prefill(kernels, case, workers=3)).all()
