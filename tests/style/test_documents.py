"""The documents are true where a program can tell."""

from pathlib import Path
import re
import subprocess
import sys

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "kernels").rglob("*.md")])
REQUIRED = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"),
    *("docs/ARCHITECTURE.md", "docs/glossary.md", "docs/operating.md", "docs/claims.md"),
)
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
MAKE = re.compile(r"`(?:[A-Z]+=\S+ )?make ([a-z-]+)`|^\s*\$? ?make ([a-z-]+)", re.MULTILINE)
# What only the makers know is no part of the project's documents.
PRIVATE = re.compile(r"/work/|\.\./shared|\bissue \d+\b|\bissue #\d+\b|\bTODO\b|\bFIXME\b", re.IGNORECASE)


def ids(path: Path) -> str:
    """Returns the name of a document for the test's id."""
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("name", REQUIRED)
def test_the_document_exists(name: str) -> None:
    """A newcomer looks for these by name."""
    assert (ROOT / name).is_file()


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_links_lead_somewhere(path: Path) -> None:
    """A dead link is a promise that nobody kept."""
    dead = [
        target
        for target in LINK.findall(path.read_text())
        if "://" not in target and not (path.parent / target.partition("#")[0]).exists() and target[0] != "#"
    ]
    assert not dead


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_make_targets_that_are_named_exist(path: Path) -> None:
    """Whoever follows the documents types them."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {one or other for one, other in MAKE.findall(path.read_text())}
    assert named <= targets


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_documents_speak_of_the_project_alone(path: Path) -> None:
    """Paths and trackers of the makers mean nothing to a reader."""
    assert not PRIVATE.findall(path.read_text())


@pytest.mark.parametrize("service", ["memsvc", "execsvc", "gateway"])
def test_every_flag_is_in_the_operators_guide(service: str) -> None:
    """An operator looks there for what can be set; a flag that is missing might as well not exist."""
    done = subprocess.run(
        [sys.executable, "-m", service, "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    flags = set(re.findall(r"^  (--[a-z-]+)", done.stdout, re.MULTILINE))
    assert flags
    guide = (ROOT / "docs" / "operating.md").read_text()
    assert not {flag for flag in flags if f"`{flag}`" not in guide}


def test_adrs_are_numbered_without_gaps() -> None:
    """A decision is cited by its number."""
    numbers = sorted(int(path.name[:4]) for path in (ROOT / "docs" / "adr").glob("[0-9]*.md"))
    assert numbers == list(range(1, len(numbers) + 1))
