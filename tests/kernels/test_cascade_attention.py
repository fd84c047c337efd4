"""Decode with shared prefixes, and merging of results, against the reference in float64."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tests.kernels.attention_case import Case, decode, make_case, outputs, workspace_for

FLOAT8 = torch.float8_e4m3fn


def _cascade_case(
    lens: list[int], groups: list[tuple[list[int], int]], dtype: torch.dtype, device: torch.device, **options: Any
) -> Case:
    """Returns a problem in which the members of each (members, shared tokens) group have the same first blocks."""
    case = make_case(lens, dtype=dtype, device=device, **options)
    for members, shared in groups:
        blocks = shared // case.shape.block_size
        case.block_tables[members, :blocks] = case.block_tables[members[0], :blocks].clone()
    return case


def _describe(workspace: Any, groups: list[tuple[list[int], int]]) -> None:
    """Writes groups into the buffers of `workspace`; unused ones stay as they are where nobody may look."""
    starts = torch.tensor([0, *(len(members) for members, _ in groups)]).cumsum(0)
    buffers = workspace.groups.columns
    buffers.starts.fill_(int(starts[-1]))
    buffers.starts[: len(starts)] = starts
    buffers.members[: int(starts[-1])] = torch.tensor([member for members, _ in groups for member in members])
    buffers.shared[: len(groups)] = torch.tensor([shared for _, shared in groups])


def _workspace(case: Case, group_max: int, workers: int = 3) -> Any:
    from kernels.paged_attention.cascade import CascadeWorkspace

    return CascadeWorkspace(workspace_for(case, workers), case.k_cache.dtype, case.q.device, group_max)


def _cascade(kernels: Any, case: Case, workspace: Any) -> tuple[torch.Tensor, torch.Tensor]:
    workspace.refresh(case.context_lens)
    out, lse = outputs(case)
    kernels.cascade(
        case.q, case.k_cache, case.v_cache, case.block_tables, case.context_lens, case.options, workspace, out=out,
        lse=lse,
    )  # fmt: skip
    return out, lse


LENS = [100, 130, 97, 33, 0, 104]
GROUPS = [([5, 0, 1], 96), ([3, 2], 32)]


@pytest.mark.parametrize("workers", [1, 5])
def test_a_shared_prefix_is_attended_to_as_if_it_were_not_shared(
    kernels: Any, float_dtype: torch.dtype, workers: int, device: torch.device
) -> None:
    """A group must get what each of its members would get alone, and whoever is in no group must not notice."""
    case = _cascade_case(LENS, GROUPS, float_dtype, device, heads=(2, 1))
    workspace = _workspace(case, 3, workers)
    _describe(workspace, GROUPS)
    out, lse = _cascade(kernels, case, workspace)
    case.check(out, lse)
    assert not out[4].any()


@pytest.mark.parametrize("window", [20, 40, 100])
def test_windows_that_begin_inside_a_shared_prefix(kernels: Any, window: int, device: torch.device) -> None:
    """Members are of different lengths, so that each one's window begins elsewhere in the prefix, or behind it."""
    case = _cascade_case(LENS, GROUPS, torch.float32, device, heads=(2, 1), window=window)
    workspace = _workspace(case, 2)
    _describe(workspace, GROUPS)
    case.check(*_cascade(kernels, case, workspace))


def test_more_members_than_one_program_takes(kernels: Any, device: torch.device) -> None:
    """A large group is cut; sinks, caps and float8 are applied once all the same."""
    sinks = torch.linspace(-1, 3, 32, device=device)
    case = _cascade_case(
        [65, 70, 66, 80], [([0, 1, 2, 3], 64)], torch.float16, device, heads=(32, 1), kv_dtype=FLOAT8, soft_cap=5.0,
        sinks=sinks, k_scale=0.5, v_scale=2.0,
    )  # fmt: skip
    workspace = _workspace(case, 1)
    assert workspace.groups.members_per_item == 2
    _describe(workspace, [([0, 1, 2, 3], 64)])
    case.check(*_cascade(kernels, case, workspace))


def test_groups_come_and_go_between_launches(kernels: Any, device: torch.device) -> None:
    """A graph is replayed with other groups: those of a former step must be forgotten."""
    case = _cascade_case(LENS, GROUPS, torch.float32, device, heads=(2, 1))
    workspace = _workspace(case, 2)
    chance = random.Random(5)
    for groups in (GROUPS, [], [([1, 5], 48)], [([2, 3], chance.choice([16, 32]))]):
        _describe(workspace, groups)
        case.check(_cascade(kernels, case, workspace)[0])
    assert torch.equal(decode(kernels, case), _plain(kernels, case, workspace))


def _plain(kernels: Any, case: Case, workspace: Any) -> torch.Tensor:
    """Returns what cascade gives without any group."""
    _describe(workspace, [])
    return _cascade(kernels, case, workspace)[0]


def test_workspaces_that_cannot_cascade_are_refused(kernels: Any, device: torch.device) -> None:
    """Results with a shared prefix depend on company: who asked for results that do not must hear of it."""
    from kernels.paged_attention.cascade import CascadeWorkspace

    case = make_case([20], device=device)
    with pytest.raises(ValueError, match="split_size"):
        CascadeWorkspace(workspace_for(case, split_size=64), torch.float32, device, 1)
    wide = make_case([20], heads=(100, 1), device=device)
    with pytest.raises(ValueError, match="query heads"):
        CascadeWorkspace(workspace_for(wide), torch.float32, device, 1)


def _state(scores: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns output and logarithm of the sum of exponentials of `[token, head, position]` scores."""
    return torch.softmax(scores, -1) @ values, torch.logsumexp(scores, -1)


def test_states_merge_in_any_order_into_the_whole(kernels: Any, device: torch.device) -> None:
    """Parts of a context that are attended to apart must add up, also if one of them is empty and holds garbage."""
    generator = torch.Generator().manual_seed(0)
    scores, values = torch.randn(7, 3, 30, generator=generator) * 5, torch.randn(30, 80, generator=generator)
    whole, whole_lse = (part.to(device) for part in _state(scores, values))
    cuts = ((0, 4), (4, 21), (21, 30))
    first, second, third = (tuple(part.to(device) for part in _state(scores[..., a:b], values[a:b])) for a, b in cuts)
    left = kernels.merge_states(*kernels.merge_states(*first, *second), *third)
    right = kernels.merge_states(*first, *kernels.merge_states(*third, *second))
    nothing = (torch.full_like(whole, float("nan")), torch.full_like(whole_lse, float("-inf")))
    for out, lse in (left, right, kernels.merge_states(*nothing, *left), kernels.merge_states(*left, *nothing)):
        assert torch.allclose(out, whole, atol=1e-5) and torch.allclose(lse, whole_lse, atol=1e-5)
    out, lse = kernels.merge_states(*nothing, *nothing)
    assert not out.any() and (lse == float("-inf")).all()
    with pytest.raises(ValueError, match="second_lse"):
        kernels.merge_states(*first, second[0], second[1][:2])
