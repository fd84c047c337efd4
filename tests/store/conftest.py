"""Stores of every kind, empty, for tests that all of them must pass."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
import dataclasses

import pytest
import pytest_asyncio

from memsvc.store import Store, open_store
from memsvc.store.memory import MemoryStore
from tests.integration.redis_server import RedisCluster, RedisServer, running_cluster, running_server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A running server."""
    with running_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    """A running cluster of three."""
    with running_cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of store: how to open it, and how it loses everything."""

    store: Store
    reopen: Callable[[], Store]
    flush: Callable[[], None]


@pytest_asyncio.fixture(params=["memory", "redis", "cluster"])
async def kind(request: pytest.FixtureRequest) -> AsyncIterator[Kind]:
    """An empty store of each kind."""
    if request.param == "memory":
        store = MemoryStore()
        found = Kind(store, lambda: store, store.forget_everything)
    elif request.param == "redis":
        server: RedisServer = request.getfixturevalue("server")

        def flush() -> None:
            with server.client() as client:
                client.flushall()

        flush()
        found = Kind(open_store(server.url), lambda: open_store(server.url), flush)
    else:
        cluster: RedisCluster = request.getfixturevalue("cluster")
        cluster.flush()
        found = Kind(open_store(cluster.url), lambda: open_store(cluster.url), cluster.flush)
    await found.store.start()
    yield found
    await found.store.close()


@pytest.fixture
def store(kind: Kind) -> Store:
    """An empty store of each kind."""
    return kind.store
