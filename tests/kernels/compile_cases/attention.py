"""Launches of the attention kernels: the heads of an 8B model, and those at the edges of the tables."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tests.kernels.compile_gate import CompileCase, Expectation

BF16, FLOAT8, FP32 = torch.bfloat16, torch.float8_e4m3fn, torch.float32
SEQUENCES = 4


def _arguments(heads: tuple[int, int], head_dim: int, kv_dtype: torch.dtype) -> list[Any]:
    """Returns queries, keys, values, tables and lengths."""
    cache = torch.zeros(9, 1, 2, heads[1], 16, head_dim).to(kv_dtype)
    q = torch.zeros(SEQUENCES, heads[0], head_dim, dtype=torch.float32 if kv_dtype == torch.float32 else BF16)
    tables = torch.ones(SEQUENCES, 8, dtype=torch.int32)
    return [q, cache[:, 0, 0], cache[:, 0, 1], tables, torch.full((SEQUENCES,), 100, dtype=torch.int32)]


def _options(heads: tuple[int, int], everything: bool) -> Any:
    from kernels.paged_attention.options import AttentionOptions

    if not everything:
        return AttentionOptions(0.1)
    return AttentionOptions(0.1, window=100, soft_cap=30.0, sinks=torch.zeros(heads[0], dtype=BF16))


def _workspace(heads: tuple[int, int], head_dim: int, kv_dtype: torch.dtype, everything: bool) -> Any:
    from kernels.paged_attention.options import HeadShape
    from kernels.paged_attention.workspace import DecodeWorkspace

    sizes: dict[str, Any] = {"windows": (100,), "split_size": 512, "context_max": 1000} if everything else {}
    return DecodeWorkspace(HeadShape(*heads, head_dim, 16), SEQUENCES, kv_dtype, torch.device("cpu"), **sizes)


def _decode(heads: tuple[int, int], head_dim: int, kv_dtype: torch.dtype, everything: bool = False) -> None:
    from kernels.paged_attention.decode import paged_attention_decode

    arguments = _arguments(heads, head_dim, kv_dtype)
    workspace = _workspace(heads, head_dim, kv_dtype, everything)
    workspace.refresh(arguments[-1])
    lse = torch.zeros(SEQUENCES, heads[0]) if everything else None
    paged_attention_decode(*arguments, _options(heads, everything), workspace, lse=lse)


def _cascade(heads: tuple[int, int], head_dim: int, kv_dtype: torch.dtype) -> None:
    from kernels.paged_attention.cascade import CascadeWorkspace, paged_attention_cascade

    arguments = _arguments(heads, head_dim, kv_dtype)
    decode = _workspace(heads, head_dim, kv_dtype, False)
    workspace = CascadeWorkspace(decode, kv_dtype, torch.device("cpu"), 2)
    workspace.refresh(arguments[-1])
    paged_attention_cascade(*arguments, _options(heads, False), workspace)


def _prefill(heads: tuple[int, int], head_dim: int, kv_dtype: torch.dtype, everything: bool = False) -> None:
    from kernels.paged_attention.prefill import paged_attention_prefill

    q, keys, values, tables, lens = _arguments(heads, head_dim, kv_dtype)
    starts = torch.tensor([0, SEQUENCES], dtype=torch.int32)
    lse = torch.zeros(SEQUENCES, heads[0]) if everything else None
    paged_attention_prefill(q, keys, values, tables[:1], lens[:1], starts, _options(heads, everything), lse=lse)


def _split(heads: tuple[int, int], head_dim: int, kv_dtype: torch.dtype, everything: bool = False) -> None:
    from kernels.paged_attention.options import HeadShape
    from kernels.paged_attention.prefill import paged_attention_prefill
    from kernels.paged_attention.prefill_split import PrefillWorkspace

    q, keys, values, tables, lens = _arguments(heads, head_dim, kv_dtype)
    starts = torch.tensor([0, SEQUENCES], dtype=torch.int32)
    options = _options(heads, everything)
    shape = HeadShape(*heads, head_dim, 16)
    workspace = PrefillWorkspace(shape, kv_dtype, q.device, windows=(options.window,), item_max=8)
    workspace.refresh(lens[:1], starts, SEQUENCES)
    lse = torch.zeros(SEQUENCES, heads[0]) if everything else None
    paged_attention_prefill(q, keys, values, tables[:1], lens[:1], starts, options, workspace, lse=lse)


def _merge_states() -> None:
    from kernels.paged_attention.states import merge_states

    out, lse = torch.zeros(SEQUENCES, 32, 128, dtype=BF16), torch.zeros(SEQUENCES, 32)
    merge_states(out, lse, out.clone(), lse.clone())


_PIPELINED = Expectation(wide_async=True)
_TENSOR_CORES = Expectation(wide_async=True, matrix_unit=True)
_FEW, _SOME = (90,), (80, 90)
_DECODE = {"_partition": Expectation(), "_decode": _PIPELINED, "_merge_parts": Expectation()}
_PREFILL = {"_prefill": _TENSOR_CORES}
# Products of float32 keep its precision, which matrix units do not.
_PLAIN_PREFILL = {"_prefill": _PIPELINED}
_SPLIT = {
    "_cut_rows": Expectation(),
    "_partition": Expectation(),
    "_prefill_parts": _TENSOR_CORES,
    "_merge_rows": Expectation(),
}
_CASCADE = {
    "_cut_groups": Expectation(),
    "_partition": Expectation(),
    "_attend_prefixes": _TENSOR_CORES,
    "_decode": _PIPELINED,
    "_merge_parts": Expectation(),
}
_PLAIN_SPLIT = {**_SPLIT, "_prefill_parts": _PIPELINED}
_PLAIN_CASCADE = {**_CASCADE, "_attend_prefixes": _PIPELINED}
CASES = [
    CompileCase("decode bf16 32/8x128", functools.partial(_decode, (32, 8), 128, BF16), _DECODE),
    CompileCase("decode e4m3 32/8x128", functools.partial(_decode, (32, 8), 128, FLOAT8), _DECODE, (90, 100)),
    CompileCase("decode e4m3 8/2x64", functools.partial(_decode, (8, 2), 64, FLOAT8), _DECODE, (90, 100)),
    CompileCase("decode e4m3 16/8x256", functools.partial(_decode, (16, 8), 256, FLOAT8), _DECODE, (90, 100)),
    CompileCase("decode bf16 16/8x256", functools.partial(_decode, (16, 8), 256, BF16), _DECODE, _SOME),
    CompileCase("decode bf16 96/2x64 all", functools.partial(_decode, (96, 2), 64, BF16, True), _DECODE, _SOME),
    CompileCase("decode e4m3 32/8x128 all", functools.partial(_decode, (32, 8), 128, FLOAT8, True), _DECODE, _FEW),
    CompileCase("cascade bf16 32/8x128", functools.partial(_cascade, (32, 8), 128, BF16), _CASCADE),
    CompileCase("cascade e4m3 32/8x128", functools.partial(_cascade, (32, 8), 128, FLOAT8), _CASCADE, (90, 100)),
    CompileCase("prefill bf16 32/8x128", functools.partial(_prefill, (32, 8), 128, BF16), _PREFILL),
    CompileCase("prefill bf16 32/8x128 all", functools.partial(_prefill, (32, 8), 128, BF16, True), _PREFILL, _SOME),
    CompileCase("prefill e4m3 32/8x128", functools.partial(_prefill, (32, 8), 128, FLOAT8), _PREFILL, (90, 100)),
    CompileCase("prefill bf16 16/8x256", functools.partial(_prefill, (16, 8), 256, BF16), _PREFILL, (90, 100)),
    CompileCase("prefill bf16 9/3x64", functools.partial(_prefill, (9, 3), 64, BF16), _PREFILL, _SOME),
    CompileCase("split prefill bf16 32/8x128", functools.partial(_split, (32, 8), 128, BF16), _SPLIT),
    CompileCase("split prefill e4m3 32/8x128", functools.partial(_split, (32, 8), 128, FLOAT8), _SPLIT, (90, 100)),
    CompileCase("split prefill bf16 16/8x256", functools.partial(_split, (16, 8), 256, BF16), _SPLIT, _FEW),
    CompileCase("split prefill bf16 9/3x64 all", functools.partial(_split, (9, 3), 64, BF16, True), _SPLIT, _SOME),
    CompileCase("decode fp32 32/8x128", functools.partial(_decode, (32, 8), 128, FP32), _DECODE, _SOME),
    CompileCase("prefill fp32 32/8x128", functools.partial(_prefill, (32, 8), 128, FP32), _PLAIN_PREFILL, _SOME),
    CompileCase("split prefill fp32 32/8x128", functools.partial(_split, (32, 8), 128, FP32), _PLAIN_SPLIT, _FEW),
    CompileCase("cascade fp32 32/8x128", functools.partial(_cascade, (32, 8), 128, FP32), _PLAIN_CASCADE, _FEW),
    CompileCase("merge_states bf16 32x128", _merge_states, {"_merge_states": Expectation(wide_loads=True)}, _FEW),
]
