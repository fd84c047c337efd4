"""The tests have teeth: every rule that is taken out of the memory core or the scheduler is missed by its scenario."""

from __future__ import annotations

import contextlib

import pytest

from memsvc.core.pool import BlockPool
from quire.errors import QuireError
from tests.mutants import (
    core_scenarios,
    gateway_scenarios,
    log_scenarios,
    mutants,
    operator_mutants,
    operator_scenarios,
    scheduler_mutants,
    scheduler_scenarios,
    sharing_mutants,
    sharing_scenarios,
    swap_mutants,
    swap_scenarios,
    window_scenarios,
)
from tests.mutants.mutation import Mutant, applied

SCENARIOS = {
    name: scenario
    for module in (
        core_scenarios,
        gateway_scenarios,
        log_scenarios,
        operator_scenarios,
        scheduler_scenarios,
        sharing_scenarios,
        swap_scenarios,
        window_scenarios,
    )
    for name, scenario in module.SCENARIOS.items()
}
MUTANTS = (
    *mutants.MUTANTS,
    *operator_mutants.MUTANTS,
    *scheduler_mutants.MUTANTS,
    *sharing_mutants.MUTANTS,
    *swap_mutants.MUTANTS,
)


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_unmutated_program_passes(name: str) -> None:
    """A scenario that fails by itself kills every mutant and proves nothing."""
    SCENARIOS[name]()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_the_mutant_is_killed(mutant: Mutant) -> None:
    """A rule whose removal nobody notices is not held by any test, and will be lost."""
    # Nothing else: a mutant that does not even run would be killed by its own typing error.
    with applied(mutant), pytest.raises((AssertionError, IndexError, QuireError)):
        SCENARIOS[mutant.killer]()


def test_each_rule_of_the_protocol_has_its_mutants() -> None:
    """The six rules were found by losing tokens without them."""
    assert {mutant.protocol_rule for mutant in MUTANTS} == set(range(7))
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 25
    assert {mutant.killer for mutant in MUTANTS} <= set(SCENARIOS)


def test_a_mutant_whose_text_is_gone_is_reported() -> None:
    """Otherwise a mutant that changes nothing would be counted as one."""
    lost = Mutant("lost", "memsvc.core.pool:BlockPool.take", "text that is not there", "", "limits_hold")
    with pytest.raises(LookupError, match="0 times"), applied(lost):
        pass


def test_a_mutant_leaves_no_trace() -> None:
    """Otherwise the next test runs on a broken program."""
    original = vars(BlockPool)["share"]
    (mutant,) = [mutant for mutant in MUTANTS if mutant.name == "sharing a block forgets who else holds it"]
    with contextlib.suppress(ZeroDivisionError), applied(mutant):
        assert vars(BlockPool)["share"] is not original
        raise ZeroDivisionError
    assert vars(BlockPool)["share"] is original
