"""Builds what is not Python: the accelerator of the memory core (C) and the step on CPUs (C++).

The rest is in pyproject.toml.

Both are optional. Without a compiler, or with QUIRE_NATIVE=off, there is neither and the package is plain Python: see
`quire.native` and `kernels.cpu.library`.
"""

from concurrent import futures
import functools
import os
from pathlib import Path
import platform
import shlex
import shutil
import sysconfig

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

_MEMORY, _CPU = Path("quire", "native"), Path("kernels", "cpu", "native")
_AVX512 = ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
# Each instruction set has a file of its own, and only that file is compiled for it: the rest runs on any processor.
_VARIANT_FLAGS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": _AVX512,
    "avx512_bf16": [*_AVX512, "-mavx512bf16"],
    "amx_bf16": [*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
# Compilers of 2020 do not know these: then the file is built without its variant.
_RECENT = {"amx_bf16": ["-DQUIRE_NO_AMX"]}


def has_compiler() -> bool:
    """Whether the compiler that would be called is there."""
    command = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    return shutil.which(shlex.split(command)[0]) is not None


class BuildWithVariants(build_ext):
    """Compiles the files of an extension one by one, each with the flags of its instruction set."""

    def build_extension(self, ext: Extension) -> None:
        """Builds one extension."""
        if ext is not cpu_step:
            super().build_extension(ext)
            return
        with futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            parts = list(pool.map(functools.partial(self.compile_variant, ext), ext.sources))
        path = self.get_ext_fullpath(ext.name)
        objects = [name for part in parts for name in part]
        self.compiler.link_shared_object(objects, path, extra_postargs=["-pthread"], target_lang="c++")

    def compile_variant(self, ext: Extension, source: str) -> list[str]:
        """Compiles one file for its instruction set, or without it; returns what came of it. Raises CompileError."""
        x86 = platform.machine().lower() in {"x86_64", "amd64"}
        name = Path(source).stem
        try:
            return self.compile_with(ext, source, _VARIANT_FLAGS.get(name, []) if x86 else [])
        except CompileError:
            if name not in _RECENT:
                raise
        return self.compile_with(ext, source, _RECENT[name])

    def compile_with(self, ext: Extension, source: str, flags: list[str]) -> list[str]:
        """Compiles one file; returns what came of it. Raises CompileError."""
        return self.compiler.compile(
            [source],
            output_dir=self.build_temp,
            extra_postargs=[*ext.extra_compile_args, *flags],
            depends=ext.depends,
        )


accelerator = Extension(
    "quire.native._accelerator",
    sources=sorted(path.as_posix() for path in _MEMORY.glob("*.c")),
    depends=sorted(path.as_posix() for path in _MEMORY.glob("*.h")),
    extra_compile_args=["-O3", "-std=c11", "-Wall", "-Wextra"],
    # One that fails to build is left out.
    optional=True,
)
# A shared library without a module's entry point: Python calls it through ctypes, which lets go of the interpreter.
cpu_step = Extension(
    "kernels.cpu._step",
    sources=sorted(path.as_posix() for path in _CPU.glob("*.cpp")),
    depends=sorted(path.as_posix() for path in _CPU.glob("*.h")),
    # No contraction: where a product and a sum round once and where twice is said in the code, not by the compiler.
    extra_compile_args=[
        *("-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-pthread"),
        # GCC finds what is set in an unrolled loop, and its own intrinsics, perhaps uninitialised.
        *("-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized"),
    ],
    language="c++",
    optional=True,
)
setup(
    ext_modules=[accelerator, cpu_step] if os.environ.get("QUIRE_NATIVE") != "off" and has_compiler() else [],
    cmdclass={"build_ext": BuildWithVariants},
)
