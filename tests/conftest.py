"""What holds for all tests."""

from __future__ import annotations

from collections.abc import Iterator
import logging
from typing import Any

import pytest
import structlog


@pytest.fixture(autouse=True)
def logging_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command that a test runs in this process sets up logging to that test's stderr, which is closed afterwards."""
    configure = structlog.configure

    def configure_for_now(**settings: Any) -> None:
        # Loggers that had kept theirs would go on writing there.
        configure(**settings | {"cache_logger_on_first_use": False})

    monkeypatch.setattr(structlog, "configure", configure_for_now)
    yield
    structlog.reset_defaults()
    root = logging.getLogger()
    for handler in list(root.handlers):
        if type(handler) is logging.StreamHandler:
            root.removeHandler(handler)
