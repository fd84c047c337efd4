"""What is measured: each kernel at the shapes of an 8B model, with the bytes it must move or the FLOP it must do."""

from collections.abc import Callable, Iterator
import dataclasses

import torch

from kernels.bench import peers
from kernels.bench.problem import PagedProblem, Scale
from kernels.block_copy.copy import block_copy
from kernels.block_swap.swap import gather_blocks, scatter_blocks
from kernels.kv_write.rotate_write import rotate_and_write
from kernels.kv_write.write import kv_write
from kernels.paged_attention.cascade import CascadeWorkspace, paged_attention_cascade
from kernels.paged_attention.decode import paged_attention_decode
from kernels.paged_attention.options import AttentionOptions, HeadShape
from kernels.paged_attention.prefill import paged_attention_prefill
from kernels.paged_attention.prefill_split import PrefillWorkspace
from kernels.paged_attention.workspace import DecodeWorkspace
from kernels.rms_norm.norm import add_rms_norm, rms_norm
from kernels.sampling.choose import most_likely, sample
from kernels.sampling.tensors import Choice, Workspace
from kernels.silu_mul.gate import silu_mul

Work = Callable[[], object]


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One piece of work, and the same work done by others."""

    name: str
    kernel: str
    """Its name in the launch tables, where it is tuned."""
    ours: Work
    moved_bytes: int = 0
    """Bytes that must be read or written; 0 for work that is bound by products."""
    flops: int = 0
    """Operations of the products, if they are what bounds it."""
    peers: dict[str, Work] = dataclasses.field(default_factory=dict)


def layer_cases(scale: Scale, device: torch.device) -> Iterator[Case]:
    """Yields norms, the gate, and what brings keys and values to the cache."""
    rows, hidden, inner, dtype = scale.rows, scale.hidden, scale.inner, torch.bfloat16
    data, stream = torch.randn(2, rows, hidden, device=device).to(dtype)
    weight = torch.ones(hidden, dtype=dtype, device=device)
    row_bytes = rows * hidden * dtype.itemsize
    yield Case(
        "rms_norm", "rms_norm", lambda: rms_norm(data, weight, 1e-5), 2 * row_bytes,
        peers=peers.rms_norm(data, weight),
    )  # fmt: skip
    yield Case("add_rms_norm", "rms_norm", lambda: add_rms_norm(data, stream, weight, 1e-5), 4 * row_bytes)
    gate_up = torch.randn(rows, 2 * inner, device=device).to(dtype)
    yield Case(
        "silu_mul", "silu_mul", lambda: silu_mul(gate_up), 3 * rows * inner * dtype.itemsize,
        peers=peers.silu_mul(gate_up),
    )  # fmt: skip
    problem = PagedProblem.build(scale, [scale.context] * scale.batch, device)
    heads = torch.randn(rows, scale.heads + 2 * scale.kv_heads, scale.head_dim, device=device).to(dtype)
    slots = torch.randperm(problem.slot_count, device=device)[:rows] + scale.block_size
    positions = torch.arange(rows, device=device) % scale.context
    table = torch.ones(scale.context, scale.head_dim // 2, device=device)
    key, value = heads[:, scale.heads : -scale.kv_heads], heads[:, -scale.kv_heads :]
    kv_bytes = 2 * rows * scale.kv_heads * scale.head_dim * dtype.itemsize
    yield Case("kv_write", "kv_write", lambda: kv_write(key, value, problem.keys, problem.values, slots), 2 * kv_bytes)
    yield Case(
        "rotate_and_write", "rotate_and_write",
        lambda: rotate_and_write(heads, table, table, positions, problem.keys, problem.values, slots),
        2 * heads.numel() * dtype.itemsize,
    )  # fmt: skip


def block_cases(scale: Scale, device: torch.device) -> Iterator[Case]:
    """Yields copies of blocks, to each other and to a buffer and back."""
    shape = (scale.layers, 2, scale.kv_heads, scale.block_size, scale.head_dim)
    cache = torch.zeros(2 * scale.moves + 1, *shape, dtype=torch.bfloat16, device=device)
    order = torch.randperm(2 * scale.moves, device=device) + 1
    pairs = order.view(scale.moves, 2)
    blocks = order[: scale.moves]
    staging = torch.empty(scale.moves, *shape, dtype=torch.bfloat16, device=device)
    moved = 2 * staging.numel() * staging.element_size()
    yield Case(
        "block_copy", "block_move", lambda: block_copy(cache, pairs), moved,
        peers={"torch index_copy_": lambda: cache.index_copy_(0, pairs[:, 1], cache[pairs[:, 0]])},
    )  # fmt: skip
    yield Case("gather_blocks", "block_move", lambda: gather_blocks(cache, blocks, staging), moved)
    yield Case("scatter_blocks", "block_move", lambda: scatter_blocks(staging, cache, blocks), moved)


def sampling_cases(scale: Scale, device: torch.device) -> Iterator[Case]:
    """Yields choices of tokens; bytes are those of one pass over the logits."""
    rows, vocabulary = scale.sampled_rows, scale.vocabulary
    logits = torch.randn(rows, vocabulary, device=device).mul(3).to(torch.bfloat16)
    out = torch.empty(rows, dtype=torch.int32, device=device)
    workspace = Workspace.allocate(rows, vocabulary, device)
    one_pass = logits.numel() * logits.element_size()
    yield Case(
        "most_likely", "sampling", lambda: most_likely(logits, out, workspace), one_pass,
        peers={"torch argmax": lambda: logits.argmax(-1)},
    )  # fmt: skip
    zeros, ones = torch.zeros(rows, dtype=torch.int32, device=device), torch.ones(rows, device=device)
    positions = torch.arange(rows, dtype=torch.int32, device=device)
    for name, top_k, top_p in (("all kept", 0, 1.0), ("top_p 0.9", 0, 0.9), ("top_k 50, top_p 0.9", 50, 0.9)):
        choice = Choice(ones, zeros + top_k, ones * top_p, ones * 0.0, zeros, zeros, ones)
        yield Case(
            f"sample, {name}", "sampling",
            lambda choice=choice: sample(logits, choice, positions, out, workspace),  # type: ignore[misc]
            one_pass, peers=peers.sampling(logits, top_k, top_p),
        )  # fmt: skip


def decode_cases(scale: Scale, device: torch.device) -> Iterator[Case]:
    """Yields decode of even and ragged batches, of one long sequence, and over a float8 cache."""
    even = [scale.context] * scale.batch
    for name, lengths, dtype in (
        ("even", even, torch.bfloat16),
        ("ragged", scale.ragged_lengths(), torch.bfloat16),
        ("one", [scale.longest], torch.bfloat16),
        ("even, float8", even, torch.float8_e4m3fn),
    ):
        problem = PagedProblem.build(scale, lengths, device, dtype)
        q = torch.randn(len(lengths), scale.heads, scale.head_dim, device=device).to(torch.bfloat16)
        work = _decode(scale, problem, q)
        row_bytes = 2 * scale.kv_heads * scale.head_dim * dtype.itemsize
        found = peers.decode(problem, q) if dtype == torch.bfloat16 else {}
        yield Case(f"decode, {name}", "paged_attention", work, sum(lengths) * row_bytes, peers=found)


def _decode(scale: Scale, problem: PagedProblem, q: torch.Tensor) -> Work:
    """Returns decode of a problem, its contexts being shared out already."""
    workspace = DecodeWorkspace(_shape(scale), len(q), problem.keys.dtype, q.device)
    workspace.refresh(problem.lens)
    options, out = AttentionOptions(scale.head_dim**-0.5), torch.empty_like(q)
    return lambda: paged_attention_decode(
        q, problem.keys, problem.values, problem.tables, problem.lens, options, workspace, out=out
    )


def _shape(scale: Scale) -> HeadShape:
    return HeadShape(scale.heads, scale.kv_heads, scale.head_dim, scale.block_size)


def cascade_cases(scale: Scale, device: torch.device) -> Iterator[Case]:
    """Yields decode of a batch of which all begin with the same blocks, beside the same without a group.

    Bytes are those of each key and value once. Where it stops paying shows what `cascade` in the tables should say.
    """
    options = AttentionOptions(scale.head_dim**-0.5)
    for name, shared_share in (("half shared", 0.5), ("nearly all shared", 0.95)):
        shared_blocks = int(scale.context * shared_share) // scale.block_size
        problem = PagedProblem.build(scale, [scale.context] * scale.batch, device)
        problem.tables[:, :shared_blocks] = problem.tables[:1, :shared_blocks].clone()
        q = torch.randn(scale.batch, scale.heads, scale.head_dim, device=device).to(torch.bfloat16)
        decode = DecodeWorkspace(_shape(scale), scale.batch, q.dtype, device)
        workspace = CascadeWorkspace(decode, q.dtype, device, 1)
        shared = shared_blocks * scale.block_size
        columns = workspace.groups.columns
        columns.starts[1] = scale.batch
        columns.members.copy_(torch.arange(scale.batch, dtype=torch.int32))
        columns.shared.fill_(shared)
        workspace.refresh(problem.lens)
        out = torch.empty_like(q)

        def work(problem: PagedProblem = problem, q: torch.Tensor = q, out: torch.Tensor = out,
                 workspace: CascadeWorkspace = workspace) -> object:  # fmt: skip
            return paged_attention_cascade(
                q, problem.keys, problem.values, problem.tables, problem.lens, options, workspace, out=out
            )

        row_bytes = 2 * scale.kv_heads * scale.head_dim * q.element_size()
        tokens = shared + scale.batch * (scale.context - shared)
        alone = {"decode without groups": _decode(scale, problem, q)}
        yield Case(f"cascade, {name}", "paged_attention", work, tokens * row_bytes, peers=alone)


def prefill_cases(scale: Scale, device: torch.device) -> Iterator[Case]:
    """Yields a whole prompt, and a turn of few tokens on a long context, shared out and not."""
    options = AttentionOptions(scale.head_dim**-0.5)
    length = scale.prompt
    problem = PagedProblem.build(scale, [length], device)
    q = torch.randn(length, scale.heads, scale.head_dim, device=device).to(torch.bfloat16)
    yield Case(
        "prefill", "paged_attention", _prefill(problem, q, options, None),
        flops=2 * scale.heads * scale.head_dim * length * length, peers=peers.prefill(problem, q),
    )  # fmt: skip
    row_bytes = 2 * scale.kv_heads * scale.head_dim * q.element_size()
    turn = PagedProblem.build(scale, [scale.longest], device)
    q = q[: scale.turn].contiguous()
    workspace = PrefillWorkspace(_shape(scale), q.dtype, device)
    starts = torch.tensor([0, len(q)], dtype=torch.int32, device=device)
    workspace.refresh(turn.lens, starts, len(q))
    yield Case(
        "prefill, a turn on a long context", "paged_attention", _prefill(turn, q, options, workspace),
        scale.longest * row_bytes, peers={"not shared out": _prefill(turn, q, options, None)},
    )  # fmt: skip


def _prefill(
    problem: PagedProblem, q: torch.Tensor, options: AttentionOptions, workspace: PrefillWorkspace | None
) -> Work:
    """Returns prefill of the last tokens of one sequence."""
    starts = torch.tensor([0, len(q)], dtype=torch.int32, device=q.device)
    out = torch.empty_like(q)
    return lambda: paged_attention_prefill(
        q, problem.keys, problem.values, problem.tables, problem.lens, starts, options, workspace, out=out
    )


FAMILIES = (decode_cases, cascade_cases, prefill_cases, layer_cases, block_cases, sampling_cases)
