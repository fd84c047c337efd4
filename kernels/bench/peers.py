"""The same work done by other libraries, as far as they can be imported.

Each function returns what it found, by name; a library that is not there is left out, and one that refuses the work is
named with its reason when it is run. Peers get keys and values in the layout that they like best, in tensors of their
own, and their planning is not timed.
"""

from collections.abc import Callable
import functools
import importlib
import importlib.util
import inspect
from typing import Any

import torch
from torch.nn import functional

from kernels.bench.problem import PagedProblem

Work = Callable[[], object]
_FLASHINFER_WORKSPACE = 2**27
_SGLANG_SPLITS = 8


@functools.cache
def _module(*names: str) -> Any:
    """Returns the first of these modules that can be imported, else None: what a peer raises then is its own."""
    for name in names:
        try:
            return importlib.import_module(name)
        except Exception:  # noqa: BLE001, S112 - a peer that cannot be imported is no peer
            continue
    return None


def rms_norm(rows: torch.Tensor, weight: torch.Tensor) -> dict[str, Work]:
    """Returns peers of `kernels.rms_norm`."""
    found: dict[str, Work] = {"torch": lambda: functional.rms_norm(rows, weight.shape, weight, 1e-5)}
    flashinfer = _module("flashinfer")
    if flashinfer is not None:
        found["flashinfer"] = lambda: flashinfer.norm.rmsnorm(rows, weight, 1e-5)
    return found


def silu_mul(gate_up: torch.Tensor) -> dict[str, Work]:
    """Returns peers of `kernels.silu_mul`."""
    gate, up = gate_up.chunk(2, -1)
    found: dict[str, Work] = {"torch": lambda: functional.silu(gate) * up}
    flashinfer = _module("flashinfer")
    if flashinfer is not None:
        found["flashinfer"] = lambda: flashinfer.activation.silu_and_mul(gate_up)
    return found


def sampling(logits: torch.Tensor, top_k: int, top_p: float) -> dict[str, Work]:
    """Returns peers of `kernels.sampling`: probabilities are part of the work."""
    found: dict[str, Work] = {}
    if not top_k and top_p >= 1.0:
        found["torch"] = lambda: torch.multinomial(torch.softmax(logits.float(), -1), 1)
    flashinfer = _module("flashinfer")
    if flashinfer is not None:
        kept = top_k or logits.shape[-1]
        found["flashinfer"] = lambda: flashinfer.sampling.top_k_top_p_sampling_from_logits(logits, kept, top_p)
    return found


def decode(problem: PagedProblem, q: torch.Tensor) -> dict[str, Work]:
    """Returns peers of decode attention."""
    found: dict[str, Work] = {}
    if len(set(problem.lengths)) == 1:
        keys, values = _contiguous(problem, problem.keys), _contiguous(problem, problem.values)
        queries = q[:, :, None]
        found["torch SDPA on contiguous keys"] = lambda: functional.scaled_dot_product_attention(
            queries, keys, values, enable_gqa=True
        )
    starts = torch.arange(len(problem.lengths) + 1, dtype=torch.int32, device=q.device)
    builders = (("flashinfer", _flashinfer), ("flash_attn_interface", _flash_attention), ("sglang", _sglang))
    for name, build in builders:
        _add(found, name, functools.partial(build, problem, q))
    _add(found, "vllm", functools.partial(_vllm, problem, q, starts, 1))
    return found


def prefill(problem: PagedProblem, q: torch.Tensor) -> dict[str, Work]:
    """Returns peers of prefill attention of one whole prompt."""
    keys, values = _contiguous(problem, problem.keys), _contiguous(problem, problem.values)
    queries = q.transpose(0, 1)[None].contiguous()
    found: dict[str, Work] = {
        "torch SDPA on contiguous keys": lambda: functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, enable_gqa=True
        )
    }
    starts = torch.tensor([0, len(q)], dtype=torch.int32, device=q.device)
    _add(found, "flash_attn_interface", functools.partial(_flash_attention, problem, q[None]))
    _add(found, "vllm", functools.partial(_vllm, problem, q, starts, len(q)))
    return found


def _add(found: dict[str, Work], name: str, build: Callable[[], Work | None]) -> None:
    """Adds a peer if it is there; one that fails while it is prepared fails again, by its reason, when it is run."""
    try:
        work = build()
    except Exception as error:  # noqa: BLE001 - whatever a peer raises is its result
        reason = f"{type(error).__name__}: {error}"

        def work() -> object:
            raise RuntimeError(reason)

    if work is not None:
        found[name] = work


def _contiguous(problem: PagedProblem, cache: torch.Tensor) -> torch.Tensor:
    """Returns `[sequence, kv_head, position, dim]` of an even batch."""
    blocks = cache[problem.tables.long()].transpose(1, 2).flatten(2, 3)
    return blocks[:, :, : problem.lengths[0]].contiguous()


def _indices(problem: PagedProblem) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the blocks of all sequences in a row, and where each sequence begins there; int32."""
    counts = [-(-length // problem.keys.shape[2]) for length in problem.lengths]
    blocks = torch.cat([problem.tables[row, :count] for row, count in enumerate(counts)])
    starts = torch.tensor([0, *counts], dtype=torch.int32, device=blocks.device).cumsum(0, dtype=torch.int32)
    return blocks, starts


def _flashinfer(problem: PagedProblem, q: torch.Tensor) -> Work | None:
    flashinfer = _module("flashinfer")
    if flashinfer is None:
        return None
    block_size = problem.keys.shape[2]
    blocks, starts = _indices(problem)
    last = (problem.lens - 1) % block_size + 1
    workspace = torch.empty(_FLASHINFER_WORKSPACE, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    wrapper.plan(
        starts, blocks, last, q.shape[1], problem.keys.shape[1], q.shape[2], block_size, q_data_type=q.dtype,
        kv_data_type=q.dtype,
    )  # fmt: skip
    cache = (problem.keys.contiguous(), problem.values.contiguous())
    return lambda: wrapper.run(q, cache)


def _token_major(cache: torch.Tensor) -> torch.Tensor:
    """Returns `[block, slot, kv_head, dim]`, contiguous."""
    return cache.transpose(1, 2).contiguous()


def _flash_attention(problem: PagedProblem, q: torch.Tensor) -> Work | None:
    module = _module("flash_attn_interface")
    if module is None:
        return None
    keys, values = _token_major(problem.keys), _token_major(problem.values)
    queries = q[:, None] if q.dim() == problem.keys.dim() - 1 else q
    return lambda: module.flash_attn_with_kvcache(
        queries, keys, values, cache_seqlens=problem.lens, page_table=problem.tables, causal=True
    )


def _vllm(problem: PagedProblem, q: torch.Tensor, starts: torch.Tensor, longest: int) -> Work | None:
    module = _module("vllm.v1.attention.ops.triton_unified_attention", "vllm.attention.ops.triton_unified_attention")
    if module is None:
        return None
    keys, values, out = _token_major(problem.keys), _token_major(problem.values), torch.empty_like(q)
    scales = torch.ones(len(problem.lengths), problem.keys.shape[1], device=q.device)
    return lambda: module.unified_attention(
        q=q, k=keys, v=values, out=out, cu_seqlens_q=starts, max_seqlen_q=longest, seqused_k=problem.lens,
        max_seqlen_k=max(problem.lengths), softmax_scale=q.shape[-1] ** -0.5, causal=True, window_size=(-1, -1),
        block_table=problem.tables, softcap=0.0, q_descale=None, k_descale=scales, v_descale=scales,
    )  # fmt: skip


def _sglang(problem: PagedProblem, q: torch.Tensor) -> Work | None:
    module = _module(
        "sglang.kernels.ops.attention.decode_attention", "sglang.srt.layers.attention.triton_ops.decode_attention"
    )
    if module is None:
        return None
    sequences, heads, dim = q.shape
    keys, values = (_token_major(cache).flatten(0, 1) for cache in (problem.keys, problem.values))
    block_size = problem.keys.shape[2]
    rows = []
    for row, length in enumerate(problem.lengths):
        positions = torch.arange(length, device=q.device)
        rows.append(problem.tables[row, positions // block_size].long() * block_size + positions % block_size)
    known: dict[str, Any] = {
        "q": q, "k_buffer": keys, "v_buffer": values, "o": torch.empty_like(q), "kv_indices": torch.cat(rows),
        "kv_indptr": torch.tensor([0, *problem.lengths], dtype=torch.int32, device=q.device).cumsum(0).int(),
        "attn_logits": torch.empty(sequences, heads, _SGLANG_SPLITS, dim, device=q.device),
        "attn_lse": torch.empty(sequences, heads, _SGLANG_SPLITS, device=q.device),
        "num_kv_splits": torch.full((sequences,), _SGLANG_SPLITS, dtype=torch.int32, device=q.device),
        "max_kv_splits": _SGLANG_SPLITS, "sm_scale": dim**-0.5, "k_scale": 1.0, "v_scale": 1.0, "logit_cap": 0.0,
    }  # fmt: skip
    # Versions differ in what they take.
    taken = inspect.signature(module.decode_attention_fwd).parameters
    arguments = {name: value for name, value in known.items() if name in taken}
    return lambda: module.decode_attention_fwd(**arguments)
