"""Captured graphs without a GPU: what ran during the capture is run again, on the same memory with the same numbers."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import os
from typing import Any
from unittest import mock

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from execsvc.gpu.runtime import EagerRuntime

# Torch's dispatch imports triton, whose own library is interpreted or not for good: tests of kernels need it to be, but
# for those that run on a device.
_INTERPRETED = {} if os.environ.get("QUIRE_KERNELS_ON") == "cuda" else {"TRITON_INTERPRET": "1"}
with mock.patch.dict(os.environ, _INTERPRETED):
    from triton.runtime.interpreter import InterpretedFunction

# What would make a capture on a GPU fail, or freeze a number that depends on content.
_FORBIDDEN = {"_local_scalar_dense", "nonzero", "masked_select", "unique2"}


def _storages(values: Any) -> set[int]:
    """Returns the storages of all tensors in a structure."""
    return {
        value.untyped_storage()._cdata
        for value in pytree.tree_leaves(values)
        if isinstance(value, torch.Tensor) and value.layout is torch.strided
    }


class _Recorder(TorchDispatchMode):
    """Notes every operation of torch; a list of things to call again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        assert name not in _FORBIDDEN, f"{name} cannot be captured: it waits for the device"
        found = func(*args, **kwargs)
        if func._schema.is_mutable:
            self.calls.append(lambda: func(*args, **kwargs))
        elif not _storages(found) & _storages((args, kwargs)):
            self.calls.append(lambda: self._again(func, args, kwargs, found))
        return found

    @staticmethod
    def _again(func: Any, args: Any, kwargs: Any, found: Any) -> None:
        """Calls an operation and puts what it returns where the first call's results are."""
        for old, new in zip(pytree.tree_leaves(found), pytree.tree_leaves(func(*args, **kwargs)), strict=True):
            old.copy_(new)


class _RecordedGraph:
    """Calls of one capture."""

    def __init__(self, calls: list[Callable[[], None]]) -> None:
        self._calls = calls

    def replay(self) -> None:
        """Runs them again."""
        for call in self._calls:
            call()


class RecordingRuntime(EagerRuntime):
    """The CPU with graphs that, as on a GPU, know nothing but memory."""

    def capture(self, work: Callable[[], None]) -> _RecordedGraph:
        """See Runtime."""
        recorder = _Recorder()
        with _recorded_launches(recorder), recorder:
            work()
        return _RecordedGraph(recorder.calls)


@contextlib.contextmanager
def _recorded_launches(recorder: _Recorder) -> Any:
    """Notes launches of interpreted kernels, too; what the interpreter itself does with tensors is no part of them."""
    original = InterpretedFunction.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        recorder.calls.append(lambda: original(self, *args, **kwargs))
        with _disable_current_modes():
            return original(self, *args, **kwargs)

    InterpretedFunction.run = run
    try:
        yield
    finally:
        InterpretedFunction.run = original
