"""What runs both ways: with everything in one process, and with a front before the engine."""

from __future__ import annotations

import pytest

from tests.simulation.world import World


@pytest.fixture(params=["one process", "front"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test twice: with requests that go to the engine, and that go through a front."""
    monkeypatch.setattr(World, "with_front", request.param == "front")
