"""Every row of docs/behaviour.md has a test, and every test that it names is there."""

from __future__ import annotations

import pytest

from tests.conformance import rows

KEYS = [str(row) for row in range(1, rows.ROW_COUNT + 1)] + [f"I{n}" for n in range(1, rows.INVARIANT_COUNT + 1)]
PROOFS = rows.proofs()
DOCUMENTED = rows.documented()


@pytest.mark.parametrize("key", KEYS)
def test_every_row_is_proved(key: str) -> None:
    """A behaviour without a test is a hope."""
    assert PROOFS[key], f"no test claims row {key}: name one test_row_{key}_... or mark it"


def test_no_test_claims_a_row_that_is_not_there() -> None:
    """A wrong number leaves another row without its proof."""
    assert list(PROOFS) == KEYS


def test_the_document_has_every_row_once_and_in_order() -> None:
    """Otherwise a reader does not find what a test's name refers to."""
    assert list(DOCUMENTED) == KEYS
    assert len({text for text, _ in DOCUMENTED.values()}) == len(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_every_test_that_the_document_names_is_there_and_proves_its_row(key: str) -> None:
    """Otherwise the document claims what nobody checks; `python -m tests.conformance.rows` writes it anew."""
    known = {rows.short(node_id) for node_id in PROOFS[key]}
    _, named = DOCUMENTED[key]
    assert named, f"row {key} names no test"
    assert set(named) <= known


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("test_row_07_the_oldest_goes", [7]),
        ("test_rows_07_and_08_the_oldest_goes", [7, 8]),
        ("test_rows_26_27_and_75_never_share", [26, 27, 75]),
        ("test_a_row_of_07_things", []),
        ("test_row_x", []),
    ],
)
def test_rows_are_read_from_names(name: str, expected: list[int]) -> None:
    """Otherwise a proof is not found, or one is counted that is none."""
    assert rows.rows_in_name(name) == expected
