"""Installs what pyproject.toml declares, not the project itself: the layer of a container image that rarely changes.

Usage:
    python scripts/install_in_image.py                                  # the plain dependencies
    python scripts/install_in_image.py --extra executor --skip triton   # and an extra, without one of its packages
    python scripts/install_in_image.py --extra executor --unpin triton  # in any version that pyproject.toml allows
    python scripts/install_in_image.py --download wheels ...            # collect the files, and what builds the project
    python scripts/install_in_image.py --wheel dist                     # build the project's own wheel

Versions are those of constraints.txt. A certificate bundle at CERTIFICATES is trusted besides the system's own, for
networks whose package index is signed by a private authority; the environment variable EXTRA_PIP_OPTIONS is passed on.
"""

import argparse
from collections.abc import Sequence
import os
from pathlib import Path
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib

CERTIFICATES = Path("build-ca.crt")
SYSTEM_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


def distribution_name(requirement: str) -> str:
    """Returns the normalised name in a requirement: "Torch_X>=2; marker" is "torch-x"."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    if found is None:
        sys.exit(f"not a requirement: {requirement!r}")
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def build_requirements_of(pyproject: Path) -> list[str]:
    """Returns what the project needs to be built."""
    return list(tomllib.loads(pyproject.read_text())["build-system"]["requires"])


def requirements_of(pyproject: Path, extras: Sequence[str], skipped: Sequence[str]) -> list[str]:
    """Returns the declared dependencies and those of `extras`, without the `skipped` distributions."""
    project = tomllib.loads(pyproject.read_text())["project"]
    declared = list(project["dependencies"])
    for extra in extras:
        if extra not in project["optional-dependencies"]:
            sys.exit(f"--extra: {extra!r} is not one of {', '.join(project['optional-dependencies'])}")
        declared += project["optional-dependencies"][extra]
    return [requirement for requirement in declared if distribution_name(requirement) not in skipped]


def pins_of(constraints: Path, unpinned: Sequence[str]) -> list[str]:
    """Returns the pins of the constraints file, without those of `unpinned`."""
    lines = [line.strip() for line in constraints.read_text().splitlines()]
    pins = [line for line in lines if line and not line.startswith("#")]
    return [pin for pin in pins if distribution_name(pin) not in unpinned]


def pip_environment(scratch: Path) -> dict[str, str]:
    """Returns pip's environment; writes the bundle of trusted certificates below `scratch` if one was brought along."""
    environment = dict(os.environ)
    if CERTIFICATES.is_file():
        bundle = scratch / "certificates.crt"
        system = SYSTEM_CERTIFICATES.read_text() if SYSTEM_CERTIFICATES.is_file() else ""
        bundle.write_text(system + CERTIFICATES.read_text())
        environment["PIP_CERT"] = str(bundle)
    return environment


def parse_arguments() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--extra", action="append", default=[], help="an extra of pyproject.toml to install besides")
    parser.add_argument("--skip", action="append", default=[], help="a distribution to leave out")
    parser.add_argument("--unpin", action="append", default=[], help="a distribution whose pin does not count")
    parser.add_argument("--also", action="append", default=[], help="a requirement to install with no dependencies")
    parser.add_argument("--download", type=Path, help="collect files in this directory and install nothing")
    parser.add_argument("--wheel", type=Path, help="build the project into this directory and install nothing")
    return parser.parse_args()


def pip_commands(options: argparse.Namespace, pins: Path) -> list[list[str]]:
    """Returns the arguments of pip, call by call; `pins` is the constraints file to use."""
    extra = shlex.split(os.environ.get("EXTRA_PIP_OPTIONS", ""))
    if options.wheel:
        return [["wheel", "--no-cache-dir", "--no-deps", "--wheel-dir", str(options.wheel), *extra, "."]]
    wanted = requirements_of(Path("pyproject.toml"), options.extra, options.skip)
    verb = ["install", "--no-cache-dir"]
    if options.download:
        verb = ["download", "--dest", str(options.download)]
        wanted += build_requirements_of(Path("pyproject.toml"))
    commands = [[*verb, *extra, "--constraint", str(pins), *wanted]]
    if options.also:
        commands.append([*verb, *extra, "--no-deps", *options.also])
    return commands


def main() -> None:
    """Runs pip."""
    options = parse_arguments()
    with tempfile.TemporaryDirectory() as name:
        pins = Path(name, "constraints.txt")
        pins.write_text("\n".join(pins_of(Path("constraints.txt"), [*options.skip, *options.unpin])) + "\n")
        environment = pip_environment(Path(name))
        for command in pip_commands(options, pins):
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
            done = subprocess.run([*pip, *command], check=False, env=environment)
            if done.returncode != 0:
                sys.exit(f"pip {command[0]} failed with exit status {done.returncode}")


if __name__ == "__main__":
    main()
