"""Paged attention against its reference in float64, with poison wherever it must not look."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.paged_attention.options import AttentionOptions, HeadShape
from kernels.paged_attention.reference import paged_attention
from tests.kernels.paged_case import Case, make_case

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3}
LENGTHS = [1, 15, 16, 17, 31, 32, 33, 100]


def _options(case: Case, window: int) -> AttentionOptions:
    return AttentionOptions(case.scale, window=window)


def _reference(case: Case, window: int = 0) -> torch.Tensor:
    return paged_attention(
        case.q, case.k_cache, case.v_cache, case.block_tables, case.context_lens, case.query_starts,
        _options(case, window),
    )[0]  # fmt: skip


def _decode(
    kernels: Any, case: Case, window: int = 0, workers: int = 3, split_size: int = 0, rows: slice = slice(None)
) -> torch.Tensor:
    from kernels.paged_attention.workspace import DecodeWorkspace

    q, lens = case.q[rows], case.context_lens[rows]
    shape = HeadShape(q.shape[1], case.k_cache.shape[1], q.shape[2], case.k_cache.shape[2])
    workspace = DecodeWorkspace(
        shape, max(len(q), 1), q.dtype, q.device, windows=(window,), split_size=split_size, context_max=700,
        workers=workers,
    )  # fmt: skip
    workspace.refresh(lens)
    out: torch.Tensor = kernels.decode(
        q, case.k_cache, case.v_cache, case.block_tables[rows], lens, _options(case, window), workspace
    )
    return out


def _prefill(kernels: Any, case: Case, window: int = 0) -> torch.Tensor:
    out: torch.Tensor = kernels.prefill(
        case.q, case.k_cache, case.v_cache, case.block_tables, case.context_lens, case.query_starts,
        _options(case, window),
    )  # fmt: skip
    return out


def _assert_close(out: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert torch.isfinite(out).all(), "poison was read"
    assert (out.double() - expected).abs().max().item() <= TOLERANCE[dtype]


@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (9, 3)])
def test_decode_equals_the_reference(kernels: Any, dtype: torch.dtype, heads: tuple[int, int]) -> None:
    """One wrong slot in a ragged batch would be one wrong sequence."""
    case = make_case(LENGTHS, [1] * len(LENGTHS), dtype, heads=heads)
    _assert_close(_decode(kernels, case), _reference(case), dtype)


def test_decode_over_several_splits(kernels: Any) -> None:
    """A long context is split and merged: the parts must add up, beside a short one that has a single part."""
    case = make_case([700, 3, 513], [1, 1, 1], torch.float32, heads=(3, 1))
    _assert_close(_decode(kernels, case), _reference(case), torch.float32)


def test_a_padded_row_of_decode_is_zero(kernels: Any) -> None:
    """Padding must not produce NaN that a later reduction spreads."""
    case = make_case([5, 0, 9], [1, 1, 1], torch.float32)
    out = _decode(kernels, case)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    expected = _reference(case)
    _assert_close(out, expected, torch.float32)


@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_head_sizes(kernels: Any, head_dim: int) -> None:
    """Models differ in head size; one that is no power of two is masked."""
    case = make_case([33, 7], [1, 1], torch.float32, heads=(4, 2), head_dim=head_dim)
    _assert_close(_decode(kernels, case), _reference(case), torch.float32)
    chunk = make_case([33, 20], [9, 20], torch.float32, heads=(4, 2), head_dim=head_dim)
    _assert_close(_prefill(kernels, chunk), _reference(chunk), torch.float32)


@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_block_sizes(kernels: Any, block_size: int) -> None:
    """Every block size that can be set must work, straddling blocks too."""
    case = make_case([65, 20], [1, 1], torch.float32, block_size=block_size)
    _assert_close(_decode(kernels, case), _reference(case), torch.float32)
    chunk = make_case([65, 20], [33, 3], torch.float32, block_size=block_size)
    _assert_close(_prefill(kernels, chunk), _reference(chunk), torch.float32)


@pytest.mark.parametrize("window", [1, 16, 40])
def test_a_sliding_window_hides_what_is_outside(kernels: Any, window: int) -> None:
    """A model with a window must not see further back, by one position."""
    case = make_case([100, 5, 41], [1, 1, 1], torch.float32)
    _assert_close(_decode(kernels, case, window), _reference(case, window), torch.float32)
    chunk = make_case([100, 41], [37, 41], torch.float32)
    _assert_close(_prefill(kernels, chunk, window), _reference(chunk, window), torch.float32)


def test_prefill_of_whole_prompts_and_of_chunks(kernels: Any, dtype: torch.dtype) -> None:
    """A chunk attends to what earlier chunks wrote, and causally to itself."""
    case = make_case([17, 50, 33, 16, 1], [17, 20, 1, 16, 1], dtype)
    _assert_close(_prefill(kernels, case), _reference(case), dtype)


def test_company_changes_no_bit_of_decode(kernels: Any) -> None:
    """The result of a sequence must not depend on the batch it is in, as long as the splits are the same."""
    case = make_case([100, 33, 64], [1, 1, 1], torch.float32)
    together = _decode(kernels, case, split_size=64)
    for row in range(3):
        alone = _decode(kernels, case, split_size=64, workers=5, rows=slice(row, row + 1))
        assert torch.equal(alone[0], together[row])


def test_the_poison_is_seen_by_one_who_looks(kernels: Any) -> None:
    """Negative control: a length that is one too long must read the poison, or these tests prove nothing."""
    case = make_case([20], [1], torch.float32)
    case.context_lens += 1
    assert not torch.isfinite(_decode(kernels, case)).all()


def test_wrong_arguments_are_named(kernels: Any) -> None:
    """A shape that does not fit must be an error that names the argument, not a read out of bounds."""
    case = make_case([20, 20], [1, 1], torch.float32)
    options = _options(case, 0)
    arguments = [case.q, case.k_cache, case.v_cache, case.block_tables, case.context_lens, case.query_starts, options]
    for name, index, wrong in (
        ("block_tables", 4, case.context_lens[:1]),
        ("k_cache", 1, case.k_cache.half()),
        ("query_starts", 5, case.query_starts[:1]),
    ):
        with pytest.raises(ValueError, match=name):
            kernels.prefill(*arguments[:index], wrong, *arguments[index + 1 :])
