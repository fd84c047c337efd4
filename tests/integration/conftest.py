"""Real services, shared by the tests that only use them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.stack import Stack, running_stack


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The demo model on a comfortable pool: 640 blocks, 10,240 tokens."""
    flags = ("--kv-cache-tokens", "10240", "--max-model-len", "2048")
    with running_stack(tmp_path_factory.mktemp("stack"), execsvc=flags) as running:
        yield running


@pytest.fixture(scope="session")
def small_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The demo model on a pool that a handful of requests exhaust: 64 blocks, 1,024 tokens."""
    flags = ("--kv-cache-tokens", "1024", "--max-model-len", "1024")
    # Who looks ahead preempts hardly anybody: here preemptions are what is tested.
    careless = ("--no-admission-forecast", "--residency-every", "1")
    # What waits for its turn here must not fail because the machine is busy.
    patient = ("--max-queue-time", "480")
    directory = tmp_path_factory.mktemp("small")
    with running_stack(directory, execsvc=flags, memsvc=careless, gateway=patient) as running:
        yield running
