"""Attention problems with poison wherever a kernel must not look, and what runs the kernels on them."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Any

import torch

from kernels.paged_attention import reference
from kernels.paged_attention.options import AttentionOptions, HeadShape
from tests.kernels.poison import poison_slots, poison_tails, poisoned, unused_slots

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
"""Norm of the error over the norm of the result."""
FLOAT8_TOLERANCE = 1e-2
NAN = float("nan")
CONTEXT_MAX = 320


@dataclasses.dataclass
class Case:
    """What an attention function takes."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    query_starts: torch.Tensor
    options: AttentionOptions

    @property
    def shape(self) -> HeadShape:
        """Heads and blocks."""
        return HeadShape(self.q.shape[1], self.k_cache.shape[1], self.q.shape[2], self.k_cache.shape[2])

    def with_options(self, **changes: Any) -> Case:
        """Returns the same problem with other options."""
        return dataclasses.replace(self, options=dataclasses.replace(self.options, **changes))

    def rows(self, rows: slice) -> Case:
        """Returns some of the sequences, which have one query each."""
        return dataclasses.replace(
            self, q=self.q[rows], block_tables=self.block_tables[rows], context_lens=self.context_lens[rows]
        )

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns output and logarithms of sums, in float64, on the CPU."""
        on_cpu = [getattr(self, field.name) for field in dataclasses.fields(self)]
        on_cpu = [field.cpu() if isinstance(field, torch.Tensor) else field for field in on_cpu]
        sinks = self.options.sinks
        options = dataclasses.replace(self.options, sinks=None if sinks is None else sinks.cpu())
        return reference.paged_attention(*on_cpu[:-1], options)

    def check(self, out: torch.Tensor, lse: torch.Tensor | None = None) -> None:
        """Compares a result with the reference."""
        wanted, wanted_lse = self.expected()
        assert torch.isfinite(out).all(), "poison was read, or a row was not written"
        tolerance = FLOAT8_TOLERANCE if self.k_cache.element_size() == 1 else TOLERANCE[self.q.dtype]
        error = (out.cpu().double() - wanted).norm(dim=-1)
        assert error.norm() <= tolerance * wanted.norm(), (error.norm() / wanted.norm(), tolerance)
        assert (error <= 5 * tolerance * wanted.norm(dim=-1) + 1e-9).all(), "one row is wrong"
        if lse is not None:
            assert torch.allclose(lse.cpu().double(), wanted_lse, rtol=0, atol=10 * tolerance)


def make_case(
    context_lens: Sequence[int],
    query_counts: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    kv_dtype: torch.dtype | None = None,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    block_size: int = 16,
    token_major: bool = False,
    poison: tuple[float, float] = (NAN, NAN),
    seed: int = 0,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Case:
    """Returns a problem.

    Args:
        context_lens: cached tokens of each sequence, its queries included.
        query_counts: queries of each sequence; None for one each.
        dtype: of the queries.
        kv_dtype: of the cache; None for that of the queries.
        heads: (query heads, kv heads).
        head_dim: elements of a head.
        block_size: slots of a block.
        token_major: slots before heads in memory, instead of heads before slots.
        poison: what unused slots of keys and of values hold.
        seed: of the content and of the order of the blocks.
        device: where the tensors lie.
        options: fields of AttentionOptions besides the scale.
    """
    generator = torch.Generator().manual_seed(seed)
    needed = torch.tensor([-(-length // block_size) for length in context_lens])
    block_count = int(needed.sum()) + 3
    # One tensor with a layer and a K/V axis, as in production: the caches are views with gaps between their rows.
    inner = (block_size, heads[1]) if token_major else (heads[1], block_size)
    content = torch.randn(block_count, 2, 2, *inner, head_dim, generator=generator)
    settings = AttentionOptions(**{"scale": head_dim**-0.5, **options})
    content[:, :, 0] /= settings.k_scale
    content[:, :, 1] /= settings.v_scale
    cache = content.to(kv_dtype or dtype)
    if token_major:
        cache = cache.transpose(3, 4)
    order = (torch.randperm(block_count - 1, generator=generator) + 1).int()
    tables = torch.zeros(len(context_lens), int(needed.max()) + 2, dtype=torch.int32)
    used = []
    for sequence, length in enumerate(context_lens):
        blocks, order = order[: needed[sequence]], order[needed[sequence] :]
        tables[sequence, : len(blocks)] = blocks
        positions = torch.arange(length)
        used.append(blocks[positions // block_size] * block_size + positions % block_size)
    poison_tails(tables, needed)
    unused = unused_slots(block_count, block_size, torch.cat(used))
    for part, value in enumerate(poison):
        poison_slots(cache[:, 1, part], unused, value)
    counts = torch.ones(len(context_lens)) if query_counts is None else torch.tensor(query_counts)
    starts = torch.cat([torch.zeros(1), counts.cumsum(0)]).int()
    q = torch.randn(int(starts[-1]), heads[0], head_dim, generator=generator).to(dtype)
    cache = cache.to(device)
    return Case(
        q.to(device), cache[:, 1, 0], cache[:, 1, 1], tables.to(device),
        torch.tensor(context_lens, dtype=torch.int32, device=device), starts.to(device), settings,
    )  # fmt: skip


def workspace_for(case: Case, workers: int = 3, split_size: int = 0, sequence_max: int = 0) -> Any:
    """Returns a workspace for decode of `case`."""
    from kernels.paged_attention.workspace import DecodeWorkspace

    return DecodeWorkspace(
        case.shape, sequence_max or len(case.context_lens), case.k_cache.dtype, case.q.device,
        windows=(case.options.window,), split_size=split_size, context_max=CONTEXT_MAX, workers=workers,
    )  # fmt: skip


def outputs(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns an output and logarithms that nobody has written yet."""
    return (
        poisoned(tuple(case.q.shape), case.q.dtype, case.q.device),
        poisoned(tuple(case.q.shape[:2]), torch.float32, case.q.device),
    )


def decode(
    kernels: Any, case: Case, workspace: Any = None, *, workers: int = 3, split_size: int = 0, lse: bool = False
) -> Any:
    """Runs decode; returns its output, or output and logarithms."""
    workspace = workspace or workspace_for(case, workers, split_size)
    workspace.refresh(case.context_lens)
    out, sums = outputs(case)
    kernels.decode(
        case.q, case.k_cache, case.v_cache, case.block_tables, case.context_lens, case.options, workspace, out=out,
        lse=sums if lse else None,
    )  # fmt: skip
    return (out, sums) if lse else out


def prefill(kernels: Any, case: Case, *, lse: bool = False, workers: int = 0) -> Any:
    """Runs prefill, shared out among `workers` if there are any; returns its output, or output and logarithms."""
    out, sums = outputs(case)
    workspace = None
    if workers:
        from kernels.paged_attention.prefill_split import PrefillWorkspace

        windows = (case.options.window,)
        workspace = PrefillWorkspace(
            case.shape, case.k_cache.dtype, case.q.device, windows=windows, workers=workers, item_max=64
        )
        assert workspace.fits(len(case.q), len(case.context_lens)), "the case is meant to be shared out"
        workspace.refresh(case.context_lens, case.query_starts, len(case.q))
    kernels.prefill(
        case.q, case.k_cache, case.v_cache, case.block_tables, case.context_lens, case.query_starts, case.options,
        workspace, out=out, lse=sums if lse else None,
    )  # fmt: skip
    return (out, sums) if lse else out


def far_case(kv_dtype: torch.dtype, query_counts: Sequence[int], device: torch.device) -> Case:
    """Returns a problem whose blocks lie more than 2^31 elements apart, in memory that is hardly touched."""
    case = make_case([30, 20], query_counts, torch.float32, kv_dtype=kv_dtype, block_size=16, device=device)
    stride = 2**30 + 64
    block_count, heads, block_size, head_dim = case.k_cache.shape
    inner = (block_size * head_dim, head_dim, 1)
    views = []
    memory = torch.empty((block_count - 1) * stride + 2 * heads * inner[0], dtype=kv_dtype, device=device)
    for part, cache in enumerate((case.k_cache, case.v_cache)):
        view = memory.as_strided((block_count, heads, block_size, head_dim), (stride, *inner), part * heads * inner[0])
        for block in range(block_count):
            view[block].view(torch.uint8).copy_(cache[block].contiguous().view(torch.uint8))
        views.append(view)
    return dataclasses.replace(case, k_cache=views[0], v_cache=views[1])
