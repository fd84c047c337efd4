"""Prefill attention, and decode and prefill in one call, against the reference in float64."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from tests.kernels.attention_case import Case, decode, far_case, make_case, outputs, prefill, workspace_for

FLOAT8 = torch.float8_e4m3fn
INFINITY = float("inf")


def test_prefill_of_whole_prompts_and_of_chunks(kernels: Any, float_dtype: torch.dtype, device: torch.device) -> None:
    """A chunk attends to what earlier chunks wrote, and causally to itself; a sequence may have no query at all."""
    case = make_case([17, 50, 33, 16, 1, 40], [17, 20, 1, 16, 1, 0], float_dtype, heads=(2, 1), device=device)
    case.check(*prefill(kernels, case, lse=True))


@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (5, 1), (16, 1), (48, 1)])
def test_prefill_with_any_group_of_heads(kernels: Any, heads: tuple[int, int], device: torch.device) -> None:
    """The rows of a program are tokens times heads: a token may be cut between two programs."""
    case = make_case([70, 30], [11, 30], heads=heads, device=device)
    case.check(prefill(kernels, case))


@pytest.mark.parametrize("head_dim", [80, 96, 112, 128, 256])
def test_prefill_with_any_head_size(kernels: Any, head_dim: int, device: torch.device) -> None:
    """Models differ in head size; one that is no power of two is masked."""
    case = make_case([70, 30], [11, 30], torch.float16, heads=(2, 1), head_dim=head_dim, device=device)
    case.check(prefill(kernels, case))


@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_prefill_with_any_block_size(kernels: Any, block_size: int, device: torch.device) -> None:
    """A tile may be several blocks, one block, or half of one."""
    case = make_case([150, 20], [33, 3], heads=(2, 1), block_size=block_size, device=device)
    case.check(prefill(kernels, case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("window", [1, 16, 64, 65, 150])
def test_a_sliding_window_hides_what_is_outside(
    kernels: Any, window: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Tiles before every row's window are not read, tiles inside every row's are not masked, the rest is."""
    case = make_case([290, 90], [100, 90], dtype, heads=(2, 1), window=window, device=device)
    case.check(prefill(kernels, case))


def test_any_cut_into_chunks_gives_what_one_piece_gives(kernels: Any, device: torch.device) -> None:
    """The scheduler cuts prompts as it likes: the answer must not depend on it."""
    whole = make_case([150], [150], torch.float16, heads=(2, 1), device=device)
    first = 0
    for count in (40, 1, 64, 45):
        chunk = dataclasses.replace(
            whole,
            q=whole.q[first : first + count],
            context_lens=torch.tensor([first + count], dtype=torch.int32, device=device),
            query_starts=torch.tensor([0, count], dtype=torch.int32, device=device),
        )
        out = prefill(kernels, chunk)
        wanted = whole.expected()[0][first : first + count]
        assert (out.cpu().double() - wanted).norm() <= 1e-3 * wanted.norm()
        first += count


def test_one_query_gives_what_decode_gives(kernels: Any, device: torch.device) -> None:
    """A prompt whose last token comes alone takes the other kernel: both must see the same positions."""
    case = make_case([100, 16, 33], heads=(2, 1), window=40, device=device)
    assert (prefill(kernels, case) - decode(kernels, case)).abs().max() < 1e-5


def test_soft_cap_and_sinks(kernels: Any, device: torch.device) -> None:
    """Scores so large that their exponential is infinite must not become NaN, and each row has its head's sink."""
    sinks = torch.tensor([0.5, 4.0], device=device)
    case = make_case([100, 30], [40, 30], heads=(2, 1), soft_cap=3.0, sinks=sinks, device=device)
    case.check(*prefill(kernels, case, lse=True))
    huge = case.with_options(scale=40.0, sinks=None)
    huge.check(prefill(kernels, huge))


def test_a_float8_cache_is_scaled_back(kernels: Any, device: torch.device) -> None:
    """Half the memory for the cache, if keys and values come back with their scales."""
    case = make_case(
        [100, 30], [40, 30], torch.bfloat16, kv_dtype=FLOAT8, heads=(2, 1), k_scale=0.5, v_scale=0.25, device=device
    )
    case.check(*prefill(kernels, case, lse=True))


@pytest.mark.parametrize("poison", [(float("nan"), 0.0), (0.0, float("nan")), (INFINITY, 0.0), (0.0, -INFINITY)])
def test_what_unused_slots_hold_does_not_matter(
    kernels: Any, poison: tuple[float, float], device: torch.device
) -> None:
    """A block's former owner may leave anything behind its new one's last token; zero times NaN is NaN."""
    case = make_case([64, 40], [20, 40], torch.float16, heads=(2, 1), poison=poison, device=device)
    case.check(prefill(kernels, case))


def test_prefill_of_a_cache_with_tokens_before_heads(kernels: Any, device: torch.device) -> None:
    """Strides say where things are: another order of axes in memory is no other kernel."""
    case = make_case([100, 31], [40, 31], token_major=True, device=device)
    case.check(prefill(kernels, case))


def test_blocks_may_lie_more_than_two_billion_elements_apart(
    kernels: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large cache has offsets that 32 bits do not hold: the kernel would read somewhere else."""
    if device.type == "cpu":
        from triton.runtime.interpreter import GridExecutor

        # It copies every argument's memory back onto itself, which would touch all of it.
        monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    case = far_case(FLOAT8, [7, 20], device)
    case.check(prefill(kernels, case))


def test_rows_of_nobody_are_left_alone(kernels: Any, device: torch.device) -> None:
    """A batch is padded: padding before and behind the queries must neither be read nor written."""
    case = make_case([30, 20], [9, 20], heads=(2, 1), device=device)
    padded = dataclasses.replace(
        case,
        q=torch.nn.functional.pad(case.q, (0, 0, 0, 0, 3, 5), value=float("nan")),
        query_starts=case.query_starts + 3,
    )
    out = prefill(kernels, padded)
    case.check(out[3:-5])
    assert out[:3].isnan().all() and out[-5:].isnan().all()


def _mixed(kernels: Any, case: Case, decode_count: int, workspace: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = outputs(case)
    workspace.refresh(case.context_lens[:decode_count])
    kernels.mixed(
        case.q, case.k_cache, case.v_cache, case.block_tables, case.context_lens, case.query_starts, decode_count,
        case.options, workspace, out=out, lse=lse,
    )  # fmt: skip
    return out, lse


@pytest.mark.parametrize("decode_count", [0, 3, 5])
def test_a_mixed_batch_gives_what_separate_calls_give(kernels: Any, decode_count: int, device: torch.device) -> None:
    """A step serves running sequences and new prompts at once; whoever shares it must not matter."""
    lens, counts = [100, 0, 64, 50, 33], [1, 1, 1, 20, 33]
    if decode_count == 5:
        counts = [1] * 5
    case = make_case(lens, counts, torch.float16, heads=(2, 1), device=device)
    if decode_count == 0:
        case = make_case(lens[3:], counts[3:], torch.float16, heads=(2, 1), device=device)
    out, lse = _mixed(kernels, case, decode_count, workspace_for(case))
    case.check(out, lse)


@pytest.mark.parametrize("seed", range(5))
def test_prefill_with_chance_choosing_everything(kernels: Any, seed: int, device: torch.device) -> None:
    """Features that work alone may not work together."""
    chance = random.Random(seed)
    heads = chance.choice([(2, 1), (3, 1), (4, 2)])
    dtype = chance.choice([torch.float32, torch.float16, torch.bfloat16])
    counts = [chance.choice([0, 1, chance.randrange(1, 90)]) for _ in range(3)]
    case = make_case(
        [count + chance.choice([0, chance.randrange(120)]) for count in counts],
        counts,
        dtype,
        kv_dtype=FLOAT8 if dtype != torch.float32 and chance.random() < 0.5 else None,
        heads=heads,
        head_dim=chance.choice([64, 80, 128]),
        block_size=chance.choice([16, 32, 64]),
        token_major=chance.random() < 0.5,
        seed=seed,
        device=device,
        window=chance.choice([0, 0, 50, 64]),
        soft_cap=chance.choice([0.0, 5.0]),
        sinks=chance.choice([None, torch.randn(heads[0], device=device)]),
        k_scale=2.0,
        v_scale=0.5,
    )
    case.check(*prefill(kernels, case, lse=True))


def test_who_looks_too_far_is_caught(kernels: Any, device: torch.device) -> None:
    """Negative control: a length that is one too long reads poison, or the other tests would prove nothing."""
    case = make_case([20], [5], heads=(2, 1), device=device)
    case.context_lens += 1
    assert not torch.isfinite(prefill(kernels, case)).all()


def test_wrong_arguments_are_named(kernels: Any, device: torch.device) -> None:
    """What does not fit must be an error that names the argument, not a read out of bounds."""
    case = make_case([20, 20], [3, 4], device=device)
    arguments = [
        case.q, case.k_cache, case.v_cache, case.block_tables, case.context_lens, case.query_starts, case.options
    ]  # fmt: skip
    for name, index, wrong in (
        ("q", 0, case.q.int()),
        ("k_cache", 1, case.k_cache.half()),
        ("block_tables", 4, case.context_lens[:1]),
        ("query_starts", 5, case.query_starts[:1]),
        ("query_starts", 5, case.query_starts.long()),
    ):
        with pytest.raises(ValueError, match=name):
            kernels.prefill(*arguments[:index], wrong, *arguments[index + 1 :])
    with pytest.raises(ValueError, match="decode_count"):
        kernels.mixed(*arguments[:6], 3, case.options, workspace_for(case))
