"""Decode attention against its reference in float64, with poison wherever it must not look."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from kernels.paged_attention.options import AttentionOptions
from tests.kernels.attention_case import decode, far_case, make_case, outputs, workspace_for

FLOAT8 = torch.float8_e4m3fn
LENGTHS = [1, 15, 16, 17, 63, 64, 65, 0, 130]
"""Around the ends of blocks and tiles, and a row of padding."""
INFINITY = float("inf")


def test_decode_equals_the_reference(kernels: Any, float_dtype: torch.dtype, device: torch.device) -> None:
    """One wrong slot in a ragged batch would be one wrong sequence. Padding must give zeros, not NaN."""
    case = make_case(LENGTHS, dtype=float_dtype, heads=(2, 1), device=device)
    out, lse = decode(kernels, case, lse=True)
    case.check(out, lse)
    assert not out[LENGTHS.index(0)].any()


@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (4, 1), (10, 2), (7, 1), (8, 1), (16, 1), (48, 1)])
def test_decode_with_any_group_of_heads(kernels: Any, heads: tuple[int, int], device: torch.device) -> None:
    """Models share a key among 1 to 48 query heads; one that is no power of two is padded."""
    case = make_case([33, 70], heads=heads, device=device)
    case.check(decode(kernels, case, workers=2))


@pytest.mark.parametrize("head_dim", [80, 96, 112, 128, 256])
def test_decode_with_any_head_size(kernels: Any, head_dim: int, device: torch.device) -> None:
    """Models differ in head size; one that is no power of two is masked."""
    case = make_case([33, 70], dtype=torch.float16, heads=(2, 1), head_dim=head_dim, device=device)
    case.check(decode(kernels, case, workers=2))


@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_decode_with_any_block_size(kernels: Any, block_size: int, device: torch.device) -> None:
    """A tile may be several blocks, one block, or half of one."""
    case = make_case([65, 130, 20], heads=(2, 1), block_size=block_size, device=device)
    case.check(decode(kernels, case))


@pytest.mark.parametrize("window", [1, 16, 63, 64, 65, 1000])
@pytest.mark.parametrize("split_size", [0, 64])
def test_a_sliding_window_hides_what_is_outside(
    kernels: Any, window: int, split_size: int, device: torch.device
) -> None:
    """A model with a window must not see further back, by one position; tiles outside it are not even read."""
    case = make_case([130, 5, 65, 0], heads=(2, 1), window=window, device=device)
    case.check(decode(kernels, case, split_size=split_size))


def test_how_work_is_shared_out_changes_nothing_but_rounding(kernels: Any, device: torch.device) -> None:
    """The number of programs follows from the device: results must not, be there one or more of them than tiles."""
    case = make_case([200, 3, 129], heads=(2, 1), device=device)
    for workers in (1, 2, 5, 40):
        case.check(decode(kernels, case, workers=workers))
    for split_size in (32, 128, 512):
        case.check(decode(kernels, case, split_size=split_size))


def test_company_changes_no_bit_with_fixed_splits(kernels: Any, float_dtype: torch.dtype, device: torch.device) -> None:
    """Who pins a seed expects the same tokens whoever else is served; and the same again when asked again."""
    case = make_case([200, 33, 129, 64], dtype=float_dtype, heads=(2, 1), device=device)
    together = decode(kernels, case, split_size=64)
    assert torch.equal(together, decode(kernels, case, split_size=64, workers=7))
    for row in range(4):
        alone = decode(kernels, case.rows(slice(row, row + 1)), split_size=64, workers=5)
        assert torch.equal(alone[0], together[row])


def test_two_runs_give_the_same_bits(kernels: Any, device: torch.device) -> None:
    """A result that changes from run to run cannot be debugged."""
    case = make_case([200, 33], dtype=torch.float16, heads=(2, 1), device=device)
    assert torch.equal(decode(kernels, case), decode(kernels, case))


def test_a_soft_cap_bounds_scores_of_any_size(kernels: Any, device: torch.device) -> None:
    """Scores so large that their exponential is infinite must not become NaN."""
    case = make_case([100, 7], heads=(2, 1), scale=40.0, soft_cap=30.0, device=device)
    case.check(decode(kernels, case))
    mild = make_case([100, 7], heads=(2, 1), soft_cap=2.0, device=device)
    mild.check(*decode(kernels, mild, lse=True))


@pytest.mark.parametrize("workers", [1, 5])
def test_sinks_count_once_whatever_the_splits(kernels: Any, workers: int, device: torch.device) -> None:
    """A sink that each split counts would make long contexts fade."""
    sinks = torch.tensor([0.5, 4.0], device=device)
    case = make_case([200, 33, 64], heads=(2, 1), sinks=sinks, device=device)
    case.check(*decode(kernels, case, workers=workers, lse=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float8_cache_is_scaled_back(kernels: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Half the memory for the cache, if keys and values come back with their scales."""
    case = make_case(
        [100, 16, 33, 0], dtype=dtype, kv_dtype=FLOAT8, heads=(2, 1), k_scale=0.5, v_scale=0.25, device=device
    )
    case.check(*decode(kernels, case, lse=True))


@pytest.mark.parametrize("poison", [(float("nan"), 0.0), (0.0, float("nan")), (INFINITY, 0.0), (0.0, -INFINITY)])
def test_what_unused_slots_hold_does_not_matter(
    kernels: Any, poison: tuple[float, float], device: torch.device
) -> None:
    """A block's former owner may leave anything behind its new one's last token; zero times NaN is NaN."""
    case = make_case([64, 16, 33, 1], dtype=torch.float16, heads=(2, 1), poison=poison, device=device)
    case.check(decode(kernels, case))


def test_a_nan_that_is_in_the_context_is_seen(kernels: Any, device: torch.device) -> None:
    """An overflow in the model must not look like an answer."""
    case = make_case([40, 20], heads=(2, 1), device=device)
    case.v_cache[case.block_tables[0, 0], :, 3] = float("nan")
    out = decode(kernels, case)
    assert out[0].isnan().all() and torch.isfinite(out[1]).all()


def test_decode_of_a_cache_with_tokens_before_heads(kernels: Any, device: torch.device) -> None:
    """Strides say where things are: another order of axes in memory is no other kernel."""
    case = make_case([100, 31], token_major=True, device=device)
    case.check(decode(kernels, case))


def test_blocks_may_lie_more_than_two_billion_elements_apart(
    kernels: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large cache has offsets that 32 bits do not hold: the kernel would read somewhere else."""
    if device.type == "cpu":
        from triton.runtime.interpreter import GridExecutor

        # It copies every argument's memory back onto itself, which would touch all of it.
        monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    case = far_case(FLOAT8, [1, 1], device)
    case.check(decode(kernels, case))


def test_a_captured_launch_serves_other_batches(kernels: Any, device: torch.device) -> None:
    """A graph is replayed with other lengths: what a former batch left in the scratch must not show."""
    long = make_case([200, 130, 90, 64], heads=(2, 1), device=device)
    workspace = workspace_for(long)
    long.check(decode(kernels, long, workspace))
    for tensor in (workspace.parts.acc, workspace.parts.maxima, workspace.parts.sums):
        tensor.fill_(float("nan"))
    short = make_case([3, 70, 0, 0], heads=(2, 1), seed=1, device=device)
    short.check(decode(kernels, short, workspace))
    nothing = make_case([0, 0, 0, 0], heads=(2, 1), device=device)
    assert not decode(kernels, nothing, workspace).any()


def test_the_partition_is_that_of_plain_arithmetic(kernels: Any, device: torch.device) -> None:
    """A tile that nobody or two programs compute would be lost or counted twice."""
    from kernels.paged_attention.partition import Partition

    chance = random.Random(3)
    for item_count, workers, unit, window in ((1, 1, 1, 0), (5, 3, 1, 0), (40, 11, 2, 0), (300, 16, 1, 100)):
        lens = [chance.choice([0, 1, 63, 64, 65, chance.randrange(2000)]) for _ in range(item_count)]
        partition = Partition.allocate(item_count + 2, workers, 64, unit, window, device)
        partition.refresh(torch.tensor(lens, dtype=torch.int32, device=device))
        offsets = [0]
        for length in lens:
            first = max(length - window, 0) // 64 if window else 0
            offsets.append(offsets[-1] + -(-(-(-length // 64) - first) // unit))
        assert partition.offsets[: item_count + 1].tolist() == offsets
        share = -(-offsets[-1] // workers)
        for worker, item in enumerate(partition.first_items.tolist()):
            if worker * share < offsets[-1]:
                assert offsets[item] <= worker * share < offsets[item + 1]


@pytest.mark.parametrize("seed", range(6))
def test_decode_with_chance_choosing_everything(kernels: Any, seed: int, device: torch.device) -> None:
    """Features that work alone may not work together."""
    chance = random.Random(seed)
    heads = chance.choice([(2, 1), (3, 1), (4, 2)])
    dtype = chance.choice([torch.float32, torch.float16, torch.bfloat16])
    case = make_case(
        [chance.choice([0, 1, chance.randrange(1, 200)]) for _ in range(4)] + [70],
        dtype=dtype,
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
    lse = chance.random() < 0.5
    result = decode(kernels, case, workers=chance.choice([1, 2, 7]), split_size=chance.choice([0, 64]), lse=lse)
    case.check(*(result if lse else (result,)))


def test_who_looks_too_far_is_caught(kernels: Any, watch: Any, device: torch.device) -> None:
    """Negative control: one token too many reads poison, one block too many garbage. Else other tests prove nothing."""
    case = make_case([20], heads=(2, 1), device=device)
    case.context_lens += 1
    assert not torch.isfinite(decode(kernels, case)).all()
    if device.type == "cpu":
        case.context_lens += 16
        decode(kernels, case)
        assert any("out of bounds" in fault for fault in watch.take())


def test_wrong_arguments_are_named(kernels: Any, device: torch.device) -> None:
    """What does not fit must be an error that names the argument, not a read out of bounds."""
    case = make_case([20, 20], device=device)
    workspace = workspace_for(case)
    arguments = [case.q, case.k_cache, case.v_cache, case.block_tables, case.context_lens, case.options, workspace]
    for name, index, wrong in (
        ("k_cache", 1, case.k_cache.half()),
        ("v_cache", 2, case.v_cache[..., :32]),
        ("block_tables", 3, case.block_tables.long()),
        ("block_tables", 4, case.context_lens[:1]),
        ("sinks", 5, AttentionOptions(1.0, sinks=torch.zeros(3))),
        ("window", 5, AttentionOptions(1.0, window=7)),
        ("sequences", 6, workspace_for(case.rows(slice(0, 1)))),
    ):
        with pytest.raises(ValueError, match=name):
            kernels.decode(*arguments[:index], wrong, *arguments[index + 1 :])
    with pytest.raises(ValueError, match="out"):
        kernels.decode(*arguments, out=outputs(case)[0].half())
    for name, wrong in (("window", -1), ("soft_cap", -1.0), ("k_scale", 0.0), ("scale", float("nan"))):
        with pytest.raises(ValueError, match=name):
            AttentionOptions(**{"scale": 1.0, name: wrong})
    # Values of 8 bits are read in pairs.
    odd = torch.zeros(2, 2, 16, 65, device=device).to(FLOAT8)[..., :64]
    with pytest.raises(ValueError, match="v_cache"):
        kernels.decode(case.q, odd, odd, *arguments[3:])
    with pytest.raises(ValueError, match="split_size"):
        workspace_for(case, split_size=17)
    with pytest.raises(ValueError, match="context_lens"):
        workspace.refresh(torch.zeros(3, dtype=torch.int32, device=device))
