"""Fixtures of the conformance tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
import contextlib
from typing import Any

import pytest
import pytest_asyncio

from quire.memory import PoolSpec
from tests.conformance.memory_connections import spec
from tests.conformance.memory_rig import Rig, grpc_rig, local_rig

OpenRig = Callable[[PoolSpec], contextlib.AbstractAsyncContextManager[Rig]]


@pytest.fixture(params=["local", "grpc"])
def open_rig(request: pytest.FixtureRequest) -> Any:
    """Opens the memory service with a pool of one's choice, in this process and behind gRPC."""
    return {"local": local_rig, "grpc": grpc_rig}[request.param]


@pytest_asyncio.fixture
async def rig(open_rig: OpenRig) -> AsyncIterator[Rig]:
    """A memory service with 32 blocks of 16 tokens."""
    async with open_rig(spec()) as opened:
        yield opened
