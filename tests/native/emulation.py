"""Builds the compiled step with AVX-512 and AMX emulated, once for all test processes; says where that is possible."""

from __future__ import annotations

from collections.abc import Sequence
import ctypes
import functools
import json
import os
from pathlib import Path
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from typing import Final

from kernels.cpu import library
from tests.made_once import made_once

VARIANTS: Final = ("avx512", "avx512_bf16", "amx_bf16")
ROOT: Final = Path(__file__).resolve().parents[2]
_HERE: Final = Path(__file__).parent
_STEP: Final = ROOT / "kernels" / "cpu" / "native"
INTRINSICS: Final = _HERE / "intrinsics.cpp"
_TILES: Final = _HERE / "tiles.cpp"
_OTHER_VARIANTS: Final = {"avx2", "neon", "portable"}
_SOURCES: Final = tuple(sorted(path for path in _STEP.glob("*.cpp") if path.stem not in _OTHER_VARIANTS))
_EMULATED: Final = (f"-I{_HERE}", "-DQUIRE_EMULATED_AVX512", "-mavx2", "-mfma")
_REAL: Final = ("-mavx2", "-mfma", *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "bf16")))
_DEADLINE_SECONDS: Final = 600
_SAY_FLAGS: Final = """
import json, setuptools
from distutils.core import run_setup
found = {part.name: part.extra_compile_args for part in run_setup("setup.py", stop_after="init").ext_modules}
print(json.dumps(found["kernels.cpu._step"]))
"""


def runs(name: str) -> bool:
    """Whether this processor has the instructions of a variant of the compiled step."""
    loaded, _ = library.load()
    return loaded is not None and any(variant.runs for variant in loaded.variants if variant.name == name)


def obstacle() -> str:
    """Why AVX-512 cannot be emulated here; empty if it can be."""
    if platform.machine().lower() not in {"x86_64", "amd64"}:
        return f"AVX-512 is emulated on x86-64 only, this is {platform.machine()}"
    if shutil.which(_compiler()[0]) is None:
        return f"there is no C++ compiler to build the emulation with: {_compiler()[0]}"
    loaded, reason = library.load()
    if loaded is None:
        return f"there is no compiled step: {reason}"
    return "" if runs("avx2") else "AVX-512 is emulated with AVX2, which this processor lacks"


def variant(name: str) -> library.Variant:
    """Returns a variant of the compiled step whose AVX-512 and AMX are emulated."""
    return next(one for one in _step_library().variants if one.name == name)


def intrinsics(*, emulated: bool) -> ctypes.CDLL:
    """Returns the functions of intrinsics.cpp, on the emulation or on the processor's own instructions."""
    return ctypes.CDLL(str(_built([INTRINSICS], _EMULATED if emulated else _REAL)))


def tiles(*, emulated: bool) -> ctypes.CDLL:
    """Returns the functions of tiles.cpp, on the emulation or on the processor's own instructions."""
    return ctypes.CDLL(str(_built([_TILES], _EMULATED if emulated else (f"-I{_STEP}", *_REAL))))


@functools.cache
def _step_library() -> library.Library:
    return library.Library(str(_built(_SOURCES, _EMULATED)))


def build(target: Path, sources: Sequence[Path], flags: Sequence[str] = _EMULATED) -> None:
    """Compiles `sources` to a shared library.

    Raises:
        RuntimeError: they do not compile; with what the compiler says.
    """
    # The bits are the same at any level of optimisation; this one costs least, building and running.
    options = [*_project_flags(), "-O1", "-fPIC", "-shared", *flags]
    _run([*_compiler(), *options, "-o", str(target), *map(str, sources)])


def _built(sources: Sequence[Path], flags: Sequence[str]) -> Path:
    """Returns the shared library of `sources`, from the cache if nothing that it is made of has changed."""
    version = subprocess.run([*_compiler(), "--version"], check=True, capture_output=True, timeout=60).stdout
    headers = sorted([*_STEP.glob("*.h"), *_HERE.glob("*.h")])
    made_of = (ROOT / "setup.py", Path(__file__), *headers, *sources)
    choices = json.dumps([platform.machine(), *flags, *map(str, sources)]).encode()
    parts = (choices, version, *(path.read_bytes() for path in made_of))
    return made_once("emulated", parts, ".so", lambda target: build(target, sources, flags))


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")


@functools.cache
def _project_flags() -> list[str]:
    """Returns what setup.py compiles the step with, read in a process of its own: setuptools changes its process."""
    environment = {name: value for name, value in os.environ.items() if name != "QUIRE_NATIVE"}
    return json.loads(_run([sys.executable, "-c", _SAY_FLAGS], environment))


def _run(command: list[str], environment: dict[str, str] | None = None) -> str:
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=_DEADLINE_SECONDS, cwd=ROOT, env=environment, check=False
    )
    if run.returncode:
        message = f"{command[0]} failed:\n{run.stderr[-4000:]}"
        raise RuntimeError(message)
    return run.stdout
