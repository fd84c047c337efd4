"""The metadata store: the same tests on both kinds, Redis being a real server; and memsvc when it goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
import time
from typing import Any

import pytest
import pytest_asyncio
import redis
import structlog

from memsvc import translate
from memsvc.server import MemsvcServer
from memsvc.store import ServiceRecord, Store, open_store
from memsvc.store.redis import RedisStore
from protos.memsvc.v1 import memsvc_pb2, memsvc_pb2_grpc
from quire.errors import ConfigError, StoreUnavailableError
from quire.rpc import open_channel
from tests.conformance.memory_connections import prompt, spec
from tests.conformance.memory_rig import grpc_rig, test_config
from tests.integration.redis_server import RedisServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A running server."""
    running = RedisServer(tmp_path_factory.mktemp("redis"))
    running.start()
    yield running
    running.kill()


@pytest_asyncio.fixture(params=["memory", "redis"])
async def store(request: pytest.FixtureRequest, server: RedisServer) -> AsyncIterator[Store]:
    """An empty store of each kind."""
    if request.param == "redis":
        with redis.Redis(port=server.port) as client:
            client.flushall()
    opened = open_store("memory://" if request.param == "memory" else server.url)
    await opened.start()
    yield opened
    await opened.close()


async def test_an_epoch_rises_above_the_floor_and_above_itself(store: Store) -> None:
    """Otherwise grants of an older life are taken for new ones."""
    assert await store.raise_epoch("p", 0) == 1
    assert await store.raise_epoch("p", 0) == 2
    assert await store.raise_epoch("p", 41) == 42
    assert await store.raise_epoch("p", 7) == 43
    assert await store.raise_epoch("other", 0) == 1


async def test_an_epoch_kept_never_falls(store: Store) -> None:
    """Otherwise what was granted while the store was away is granted again."""
    await store.keep_epoch("p", 10)
    await store.keep_epoch("p", 4)
    assert await store.raise_epoch("p", 0) == 11


async def test_an_epoch_is_exact_up_to_its_maximum(store: Store) -> None:
    """Otherwise a large epoch is rounded, and two lives share one."""
    assert await store.raise_epoch("p", 2**32 - 2) == 2**32 - 1
    assert await store.raise_epoch("p", 0) == 2**32


async def test_a_name_belongs_to_one_incarnation_at_a_time(store: Store) -> None:
    """Otherwise a service that was replaced takes its name back."""
    old, new = ServiceRecord("memsvc", "m", 1, "h:1"), ServiceRecord("memsvc", "m", 2**64 - 1, "h:2")
    assert await store.announce(old, 30.0)
    assert not await store.announce(new, 30.0)
    assert await store.services("memsvc") == [old]
    assert await store.announce(new, 30.0, takeover=True)
    assert not await store.announce(old, 30.0)
    assert not await store.withdraw(old)
    assert await store.services("memsvc") == [new]
    assert await store.withdraw(new)
    assert await store.services("memsvc") == []


async def test_a_service_that_is_silent_is_forgotten(store: Store) -> None:
    """Otherwise dead services are looked for forever."""
    await store.announce(ServiceRecord("executor", "e", 1, "h:1"), 0.05)
    await store.announce(ServiceRecord("executor", "f", 1, "h:2"), 30.0)
    await asyncio.sleep(0.1)
    assert [record.name for record in await store.services("executor")] == ["f"]


async def test_scripts_are_loaded_again_when_the_server_has_forgotten_them(server: RedisServer) -> None:
    """Otherwise a restart of Redis ends every write."""
    store = RedisStore(server.url)
    first = await store.raise_epoch("q", 0)
    with redis.Redis(port=server.port) as client:
        client.script_flush()
    assert await store.raise_epoch("q", 0) == first + 1
    await store.close()


async def test_a_store_that_is_down_fails_at_once_and_warns_once(tmp_path: Path) -> None:
    """Otherwise every registration waits for a timeout, and the log fills up."""
    server = RedisServer(tmp_path)
    store = RedisStore(server.url, timeout=0.3)
    with structlog.testing.capture_logs() as logs:
        await store.start()
        begun = time.monotonic()
        for _ in range(20):
            with pytest.raises(StoreUnavailableError):
                await store.raise_epoch("p", 0)
        assert time.monotonic() - begun < 1.0
        server.start()
        await asyncio.sleep(0.6)
        assert await store.raise_epoch("p", 0) == 1
    await store.close()
    server.kill()
    events = [entry["event"] for entry in logs]
    assert events == ["store_unavailable", "store_recovered"]


@pytest.mark.parametrize("url", ["", "memory", "http://x", "redis://h:port/0"])
def test_a_store_that_cannot_be_is_refused(url: str) -> None:
    """Otherwise a typing error in a setting is found at the first write."""
    with pytest.raises(ConfigError, match="--store"):
        open_store(url)


async def register(address: str, executor: str, *, incarnation: int, floor: int = 0) -> int:
    """Registers a pool and returns its epoch."""
    async with open_channel(address) as channel:
        request = memsvc_pb2.RegisterPoolRequest(
            executor_id="executor-0",
            executor_incarnation=incarnation,
            address=executor,
            spec=translate.from_spec(spec()),
            epoch_floor=floor,
        )
        response = await memsvc_pb2_grpc.MemoryServiceStub(channel).RegisterPool(request, timeout=5)
    return int(response.epoch)


async def test_epochs_rise_over_restarts_of_memsvc_with_a_store_and_with_a_floor(server: RedisServer) -> None:
    """Otherwise an executor takes plans of the new life for those of the old one."""
    with redis.Redis(port=server.port) as client:
        client.flushall()
    epochs = []
    for _ in range(3):
        running = MemsvcServer(test_config(store=server.url))
        epochs.append(await register(await running.start(), "h:1", incarnation=5))
        await running.stop()
    assert epochs == [1, 2, 3]
    embedded = MemsvcServer(test_config())
    assert await register(await embedded.start(), "h:1", incarnation=5, floor=epochs[-1]) == 4
    await embedded.stop()


async def test_memsvc_goes_on_while_redis_is_killed_flushed_and_restarted(tmp_path: Path) -> None:
    """Otherwise a shared convenience is a single point of failure."""
    server = RedisServer(tmp_path)
    server.start()
    config = test_config(store=server.url, lease_ttl=1.5, heartbeat_interval=0.1)
    async with grpc_rig(spec(), config) as rig:
        await rig.run(prompt(40))
        server.kill()
        begun = time.monotonic()
        for seed in range(50):
            await rig.run(prompt(40, seed))
        assert time.monotonic() - begun < 2.0
        epoch = await register(rig.address, "h:1", incarnation=8)
        assert epoch > rig.epoch
        server.start()
        with redis.Redis(port=server.port) as client:
            deadline = time.monotonic() + 5
            while client.get("quire:{memsvc}:epoch:executor-0") != str(epoch).encode():
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)
            client.flushall()
        assert await register(rig.address, "h:1", incarnation=9) == epoch + 1
        rig.epoch = epoch + 1
    server.kill()


async def test_memsvc_and_its_executors_are_in_the_registry(server: RedisServer) -> None:
    """Otherwise other services cannot find them."""
    config = test_config(store=server.url, lease_ttl=0.6, heartbeat_interval=0.1)
    running = MemsvcServer(config)
    address = await running.start()
    await register(address, "h:1", incarnation=5)
    await asyncio.sleep(0.3)
    store: Any = open_store(server.url)
    assert [record.address for record in await store.services("memsvc")] == [address]
    assert [record.nonce for record in await store.services("executor")] == [5]
    await running.stop()
    await asyncio.sleep(0.7)
    assert await store.services("memsvc") == []
    await store.close()


async def test_a_port_in_use_is_an_error() -> None:
    """Otherwise a second start shares the port with the first and takes half of its calls."""
    first = MemsvcServer(test_config())
    port = int((await first.start()).rpartition(":")[2])
    second = MemsvcServer(test_config(port=port))
    with pytest.raises(ConfigError, match="port is in use"):
        await second.start()
    await second.host.server.stop(None)
    await first.stop()
