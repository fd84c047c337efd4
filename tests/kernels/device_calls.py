"""Lets interpreted kernels call device functions quickly, and whatever was imported first.

Two things are missing in Triton's interpreter: a call of a device function remaps the language again, which takes
milliseconds, and never puts it back; and functions of Triton's own library are interpreted only if the environment
said so when triton was first imported, which another test may have done.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
from typing import Any

import pytest
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction


class _Remapping:
    """The remapped modules of one launch, put back together when the launch ends."""

    def __init__(self) -> None:
        self.scopes: list[Any] = []
        self.modules: set[int] = set()

    def restore(self) -> None:
        """Puts everything back, last first."""
        while self.scopes:
            self.scopes.pop().restore()
        self.modules.clear()


@contextlib.contextmanager
def quick_device_calls() -> Iterator[None]:
    """Within, device functions cost a call, and functions of Triton's library can be called in any case."""
    stock = interpreter._patch_lang
    remapping = _Remapping()
    interpreted: dict[Any, Any] = {}

    def remap_once(function: Any) -> _Remapping:
        key = id(function.__globals__)
        if key not in remapping.modules:
            remapping.scopes.append(stock(function))
            remapping.modules.add(key)
        return remapping

    def call(self: Any, *args: Any, **options: Any) -> Any:
        if self.fn not in interpreted:
            interpreted[self.fn] = interpreter.InterpretedFunction(self.fn)
        return interpreted[self.fn](*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", remap_once)
        patch.setattr(JITFunction, "__call__", call)
        yield
