"""Mutants change rules that are written in Python: the accelerator, which has its own, is set aside."""

from __future__ import annotations

import pytest

from quire import native


@pytest.fixture(autouse=True)
def in_python(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has everything computed in Python, but in tests of the accelerator's own mutants."""
    if request.node.path.name != "test_native_mutants.py":
        monkeypatch.setattr(native, "accelerator", None)
