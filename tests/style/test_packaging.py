"""The distribution installs beside others and stays small where it can."""

from importlib import metadata
from pathlib import Path
import re
import subprocess
import sys
import tomllib

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def loaded_modules(statement: str) -> set[str]:
    """Returns the top-level modules that a fresh Python has loaded after `statement`."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return set(done.stdout.split())


def test_kernels_does_not_pose_as_another_distribution() -> None:
    """`transformers` probes for a package of this name: a wrong version, or a heavy import, breaks it for our users."""
    source = (ROOT / "kernels" / "__init__.py").read_text()
    assert '__version__ = "0.0.0"' in source
    assert not loaded_modules("import kernels") & {"torch", "triton", "numpy"}
    version = tuple(int(part) for part in PROJECT["version"].split("."))
    assert version < (0, 9, 0)


def test_no_requirement_is_the_other_kernels_distribution() -> None:
    """Two distributions that install the same package overwrite each other's files."""
    extras = [item for extra in PROJECT["optional-dependencies"].values() for item in extra]
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    names = {re.split(r"[^A-Za-z0-9_.-]", line)[0].lower() for line in [*PROJECT["dependencies"], *extras, *pinned]}
    assert not names & {"kernels", "transformers"}


@pytest.mark.parametrize("module", ["memsvc.server", "gateway.server", "quire.cli.main", "quire.client"])
def test_only_the_executor_needs_torch(module: str) -> None:
    """The images of memsvc and the gateway have no torch, and a client needs none."""
    assert not loaded_modules(f"import {module}") & {"torch", "triton", "transformers", "safetensors", "gguf"}


def test_a_client_starts_without_the_command_line() -> None:
    """A program that imports the client should not pay for a terminal library."""
    assert not loaded_modules("from quire import Client") & {"typer", "redis", "numpy", "torch"}


def test_every_dependency_is_pinned_for_development() -> None:
    """Otherwise two fresh clones test different things."""
    pinned = {
        re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    }
    extras = [item for extra in PROJECT["optional-dependencies"].values() for item in extra]
    wanted = {
        re.sub(r"[-_.]+", "-", re.split(r"[^A-Za-z0-9_.-]", item)[0]).lower()
        for item in [*PROJECT["dependencies"], *extras]
    }
    assert wanted <= pinned


def test_the_version_is_the_newest_of_the_changelog() -> None:
    """A release whose notes are missing tells nobody what changed."""
    newest = re.search(r"^## \[?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == PROJECT["version"] == metadata.version("quire")


def test_assertions_are_never_stripped() -> None:
    """Assertions guard what must not be; an image that strips them serves wrong answers quietly."""
    files = [ROOT / "Makefile", ROOT / ".ci" / "run", *ROOT.glob("Dockerfile*"), *ROOT.glob("docker-compose*.yml")]
    assert not [path.name for path in files if re.search(r"PYTHONOPTIMIZE\s*[=:]|python3? -O", path.read_text())]
