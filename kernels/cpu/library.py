"""The compiled step: where it is, which variants it has, and the structures that it takes.

It is optional. Where it was not built (there was no C++ compiler), or with QUIRE_NATIVE=off or QUIRE_CPU_ISA=off, there
is none and torch computes. The library has a variant for each instruction set and takes the best that the processor
has; QUIRE_CPU_ISA names another, for tests and comparisons.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.util
import os
from typing import Final

OFF: Final = "off"
SLOW: Final = frozenset({"portable", "portable_bf16"})
"""Variants that run everywhere and are fast nowhere."""
_pointer = ctypes.c_void_p
_int = ctypes.c_int32


class MatrixArguments(ctypes.Structure):
    """`QuireMatrix` of abi.h."""

    _fields_ = [("panels", _pointer), ("format", ctypes.c_int64)]


class LayerArguments(ctypes.Structure):
    """`QuireLayer` of abi.h."""

    _fields_ = [
        *((name, MatrixArguments) for name in ("qkv", "output", "gate_up", "down")),
        *((name, _pointer) for name in ("input_norm", "mlp_norm", "q_norm", "k_norm", "qkv_bias", "output_bias")),
    ]


class ModelArguments(ctypes.Structure):
    """`QuireModel` of abi.h."""

    _fields_ = [
        *((name, _int) for name in ("hidden", "inner", "heads", "kv_heads", "head_dim")),
        *((name, _int) for name in ("layer_count", "vocab", "block_size", "window", "cache_format")),
        ("eps", ctypes.c_float),
        ("layers", ctypes.POINTER(LayerArguments)),
        ("embeddings", MatrixArguments),
        ("head", MatrixArguments),
        *((name, _pointer) for name in ("final_norm", "cosines", "sines")),
    ]


class BatchArguments(ctypes.Structure):
    """`QuireBatch` of abi.h."""

    _fields_ = [
        *((name, _int) for name in ("token_count", "sequence_count", "sampled_count", "table_stride")),
        *((name, _pointer) for name in ("tokens", "positions", "slots", "tables", "context_lens", "query_starts")),
        *((name, _pointer) for name in ("sampled_rows", "cache", "logits", "best")),
    ]


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """The kernels for one instruction set."""

    library: Library
    index: int
    name: str
    runs: bool
    """Whether this processor has the instructions."""


class Library:
    """The loaded library."""

    def __init__(self, path: str) -> None:
        """Loads it; raises OSError if it cannot be."""
        loaded = ctypes.CDLL(path)
        self._variant = loaded.quire_cpu_variant
        self._variant.restype, self._variant.argtypes = ctypes.c_char_p, [ctypes.c_int, ctypes.POINTER(ctypes.c_int)]
        self.open = loaded.quire_cpu_open
        self.open.restype = _pointer
        self.open.argtypes = [ctypes.POINTER(ModelArguments), ctypes.c_int, ctypes.c_int]
        self.step = loaded.quire_cpu_step
        self.step.restype, self.step.argtypes = ctypes.c_int, [_pointer, ctypes.POINTER(BatchArguments)]
        self.close = loaded.quire_cpu_close
        self.close.restype, self.close.argtypes = None, [_pointer]
        self.variants: tuple[Variant, ...] = tuple(self._list_variants())
        """All of them, the fastest first."""

    def _list_variants(self) -> list[Variant]:
        found: list[Variant] = []
        runs = ctypes.c_int()
        while (name := self._variant(len(found), ctypes.byref(runs))) is not None:
            found.append(Variant(self, len(found), name.decode("ascii"), bool(runs.value)))
        return found


@functools.cache
def load() -> tuple[Library | None, str]:
    """Returns the library, or None and why there is none."""
    if os.environ.get("QUIRE_NATIVE") == OFF:
        return None, f"QUIRE_NATIVE={OFF}"
    spec = importlib.util.find_spec("kernels.cpu._step")
    if spec is None or spec.origin is None:
        return None, "it was not built: no C++ compiler was there at installation"
    try:
        return Library(spec.origin), ""
    except OSError as error:
        return None, str(error)


def choose(name: str = "") -> tuple[Variant | None, str]:
    """Returns the variant to use, or None and why there is none.

    Args:
        name: of the variant; empty takes QUIRE_CPU_ISA, and without that the fastest that this processor runs.
    """
    library, reason = load()
    name = name or os.environ.get("QUIRE_CPU_ISA", "")
    if library is None or name == OFF:
        return None, reason or f"QUIRE_CPU_ISA={OFF}"
    for variant in library.variants:
        if variant.runs and name in {"", variant.name}:
            return variant, ""
    known = ", ".join(variant.name for variant in library.variants if variant.runs)
    return None, f"QUIRE_CPU_ISA={name}: this processor runs {known}"
