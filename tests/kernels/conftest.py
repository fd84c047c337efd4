"""The Triton kernels, run by Triton's interpreter on the CPU, or on a CUDA device by `QUIRE_KERNELS_ON=cuda`.

Whether a kernel is interpreted is decided when it is decorated, so one process does one or the other; the tests and
their parameters are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
import importlib
import os
import sys
from typing import Any

import pytest
import torch

ON_DEVICE = os.environ.get("QUIRE_KERNELS_ON") == "cuda"

HOST_FUNCTIONS = {
    "add_rms_norm": "kernels.rms_norm.norm:add_rms_norm",
    "block_copy": "kernels.block_copy.copy:block_copy",
    "cascade": "kernels.paged_attention.cascade:paged_attention_cascade",
    "change_logits": "kernels.sampling.change:change_logits",
    "decode": "kernels.paged_attention.decode:paged_attention_decode",
    "gather_blocks": "kernels.block_swap.swap:gather_blocks",
    "kv_write": "kernels.kv_write.write:kv_write",
    "merge_states": "kernels.paged_attention.states:merge_states",
    "mixed": "kernels.paged_attention.mixed:paged_attention_mixed",
    "most_likely": "kernels.sampling.choose:most_likely",
    "note_tokens": "kernels.sampling.change:note_tokens",
    "prefill": "kernels.paged_attention.prefill:paged_attention_prefill",
    "report": "kernels.sampling.choose:report",
    "rms_norm": "kernels.rms_norm.norm:rms_norm",
    "rotate": "kernels.rotary.rotate:rotate",
    "rotate_and_write": "kernels.kv_write.rotate_write:rotate_and_write",
    "sample": "kernels.sampling.choose:sample",
    "scatter_blocks": "kernels.block_swap.swap:scatter_blocks",
    "silu_mul": "kernels.silu_mul.gate:silu_mul",
}
"""Short name of a host function: where it is. Imported at first use."""


class HostFunctions:
    """The host functions of the kernels as attributes."""

    def __getattr__(self, name: str) -> Any:
        """Imports a host function, and makes sure that what it launches runs where the test thinks it does.

        A module that was imported before without the interpreter is an error here, not a silent test of something
        else.
        """
        if name not in HOST_FUNCTIONS:
            raise AttributeError(name)
        module_name, function = HOST_FUNCTIONS[name].split(":")
        module = importlib.import_module(module_name)
        wanted, unwanted = ("JITFunction", "InterpretedFunction")[:: 1 if ON_DEVICE else -1]
        for loaded in [part for part in sys.modules if part.startswith("kernels.")]:
            kinds = {type(value).__name__ for value in vars(sys.modules[loaded]).values()}
            assert unwanted not in kinds, f"{loaded} was imported before, for {unwanted} instead of {wanted}"
        return getattr(module, function)


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu) if ON_DEVICE else "cpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the tensors of a test lie: the CPU for the interpreter, or the CUDA device."""
    return torch.device(request.param)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Iterator[Any]:
    """The memory checker around every launch of a test; on a device there is none, and nothing is found.

    A fault that the test does not take for itself fails it.
    """
    if device.type != "cpu":
        from tests.kernels.launch_watch import LaunchWatch

        yield LaunchWatch()
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from tests.kernels.device_calls import quick_device_calls
    from tests.kernels.launch_watch import watched_launches
    from tests.kernels.narrow_floats import exact_narrow_floats

    with quick_device_calls(), exact_narrow_floats(), watched_launches() as found:
        yield found
    assert found.faults == []


@pytest.fixture
def kernels(watch: Any) -> Any:
    """The host functions of the kernels: exact for bfloat16 and float8, and watched. The environment is put back."""
    return HostFunctions()


@pytest.fixture(params=[torch.float32, torch.float16], ids=["float32", "float16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The two element types that need no care."""
    found: torch.dtype = request.param
    return found


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"])
def float_dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Every element type that activations may have."""
    found: torch.dtype = request.param
    return found
