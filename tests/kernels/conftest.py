"""The Triton kernels, run by Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The host functions of the kernels, under the interpreter; the variable is gone again after the test.

    Whether a kernel is interpreted is decided when it is decorated. Only the first import decides, so a module that was
    imported before without the interpreter is an error here, not a silent test of something else.
    """
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    write = importlib.import_module("kernels.kv_write.write")
    copy = importlib.import_module("kernels.block_copy.copy")
    decode = importlib.import_module("kernels.paged_attention.decode")
    prefill = importlib.import_module("kernels.paged_attention.prefill")
    for module, name in ((write, "_kv_write"), (copy, "_block_copy"), (decode, "_decode_split"), (prefill, "_prefill")):
        assert type(getattr(module, name)).__name__ == "InterpretedFunction", f"{name} is not interpreted"
    return SimpleNamespace(
        kv_write=write.kv_write,
        block_copy=copy.block_copy,
        decode=decode.paged_attention_decode,
        prefill=prefill.paged_attention_prefill,
    )


@pytest.fixture(params=[torch.float32, torch.float16], ids=["float32", "float16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Element types that the stock interpreter computes rightly; bfloat16 it silently does not."""
    found: torch.dtype = request.param
    return found
