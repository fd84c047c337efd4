"""The comparison with Python has teeth: a rule that is taken out of the accelerator shows in what the two cores do."""

from __future__ import annotations

import shutil

import pytest

from quire import native
from quire.errors import InvariantError
from tests.mutants.native_mutants import NATIVE, Builder, NativeMutant
from tests.properties.native_pair import Pair

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
COMMANDS = 150
SEEDS = 12


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    """What builds the mutants."""
    return Builder(tmp_path_factory.mktemp("native"))


def compare(accelerator: native.Accelerator) -> None:
    """Gives random commands to a core with `accelerator` and to one in Python; raises AssertionError if they differ."""
    for seed in range(SEEDS):
        pair = Pair(seed, accelerator)
        for _ in range(COMMANDS):
            pair.step()


def test_the_accelerator_builds_without_warnings(builder: Builder) -> None:
    """A warning of today is a crash of tomorrow; and a comparison that fails by itself kills every mutant."""
    compare(builder.build())


@pytest.mark.parametrize("mutant", NATIVE, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_the_native_mutant_is_killed(mutant: NativeMutant, builder: Builder) -> None:
    """A rule whose removal nobody notices would be lost with the next change of the C source."""
    accelerator = builder.build(mutant)
    with pytest.raises((AssertionError, InvariantError, ValueError, RuntimeError)):
        compare(accelerator)


def test_a_native_mutant_whose_text_is_gone_is_reported(builder: Builder) -> None:
    """Otherwise a mutant that changes nothing would be counted as one."""
    with pytest.raises(LookupError, match="0 times"):
        builder.build(NativeMutant("lost", "journal.c", "text that is not there", ""))
