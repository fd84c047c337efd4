"""Builds the accelerator of the memory core; all else that there is to say is in pyproject.toml.

Without a C compiler, or with QUIRE_NATIVE=off, there is none and the package is plain Python: see `quire.native`.
"""

import os
from pathlib import Path
import shlex
import shutil
import sysconfig

from setuptools import Extension, setup

_FOLDER = Path("quire", "native")


def has_compiler() -> bool:
    """Whether the compiler that would be called is there."""
    command = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    return shutil.which(shlex.split(command)[0]) is not None


accelerator = Extension(
    "quire.native._accelerator",
    sources=sorted(path.as_posix() for path in _FOLDER.glob("*.c")),
    depends=sorted(path.as_posix() for path in _FOLDER.glob("*.h")),
    extra_compile_args=["-O3", "-std=c11", "-Wall", "-Wextra"],
    # One that fails to build is left out.
    optional=True,
)
setup(ext_modules=[accelerator] if os.environ.get("QUIRE_NATIVE") != "off" and has_compiler() else [])
