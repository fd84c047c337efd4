"""Tests of the executor compute on one thread: others run beside them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.unit.execsvc.compiled import emulated_variants


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Says in a test's name which variants of the compiled step are emulated."""
    return f"{val}-emulated" if argname == "variant" and val in emulated_variants() else None


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Computes on one thread, as the executor does on two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
