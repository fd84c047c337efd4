"""Memory services that share a store: each finds what the other holds, and loses nothing when the store does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
import contextlib
import hashlib
from pathlib import Path
import signal
import ssl
import subprocess
from typing import Any

import grpc
import pytest

from memsvc import translate
from memsvc.server import MemsvcServer
from memsvc.sharing.replica import Replica
from memsvc.store import open_store
from memsvc.store.credentials import Credentials
from protos.memsvc.v1 import memsvc_pb2, memsvc_pb2_grpc
from quire.errors import ConfigError, StoreUnavailableError
from quire.memory import AdmitRequest, CloseReason, JournalEntry
from quire.rpc import open_channel
from tests.conformance.memory_connections import POOL_ID, StreamConnection, pack, prompt, spec
from tests.conformance.memory_rig import Rig, grpc_rig, test_config
from tests.integration.redis_server import RedisServer, running_cluster, running_server
from tests.integration.stack import start_service

SECONDS = 15.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A running server."""
    with running_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def secret(tmp_path: Path) -> str:
    """A file with the secret that the services share."""
    path = tmp_path / "secret"
    path.write_text("sixteen bytes at least")
    return str(path)


@contextlib.asynccontextmanager
async def service(url: str, secret: str, name: str, **fields: Any) -> AsyncIterator[Rig]:
    """Yields a memory service with a pool named after it."""
    config = test_config(store=url, memsvc_id=name, tenant_secret_file=secret, **{"lease_ttl": 1.2, **fields})
    async with grpc_rig(spec(64), config) as rig:
        yield rig


async def locate(address: str, tokens: list[int], **fields: Any) -> memsvc_pb2.LocateResponse:
    """Asks a service where a prompt is."""
    async with open_channel(address) as channel:
        request = memsvc_pb2.LocateRequest(token_ids=pack(tokens), **fields)
        return await memsvc_pb2_grpc.MemoryServiceStub(channel).Locate(request, timeout=5)


async def eventually(condition: Callable[[], Any]) -> None:
    """Waits until an asynchronous condition holds."""
    async with asyncio.timeout(SECONDS):
        while not await condition():
            await asyncio.sleep(0.02)


async def keep_alive(rig: Rig, executor_id: str) -> None:
    """Sends heartbeats of an executor for as long as it runs."""
    async with open_channel(rig.address) as channel:
        stub = memsvc_pb2_grpc.MemoryServiceStub(channel)
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                await stub.Heartbeat(memsvc_pb2.HeartbeatRequest(executor_id=executor_id, executor_incarnation=7))
            await asyncio.sleep(0.1)


def flush(server: RedisServer) -> None:
    """Empties a server."""
    with server.client() as client:
        client.flushall()


async def register(address: str, executor_id: str, executor: str, incarnation: int = 7) -> int:
    """Registers a pool and returns its epoch."""
    async with open_channel(address) as channel:
        request = memsvc_pb2.RegisterPoolRequest(
            executor_id=executor_id,
            executor_incarnation=incarnation,
            address=executor,
            spec=translate.from_spec(spec(64)),
        )
        return (await memsvc_pb2_grpc.MemoryServiceStub(channel).RegisterPool(request, timeout=5)).epoch


def hinted(response: memsvc_pb2.LocateResponse) -> dict[str, int]:
    """Returns the pools of other services in an answer."""
    return {location.pool_id: location.token_count for location in response.locations if not location.exact}


async def test_a_service_finds_what_another_holds_and_its_own_exactly(server: RedisServer, secret: str) -> None:
    """Otherwise a prompt is computed where nothing of it is, beside a service that has all of it."""
    flush(server)
    async with service(server.url, secret, "a", lease_ttl=30.0) as rig:
        other = MemsvcServer(test_config(store=server.url, memsvc_id="b", tenant_secret_file=secret))
        address = await other.start()
        tokens = prompt(200)
        await rig.run(tokens)
        assert rig.server is not None
        assert rig.server.tail is not None
        await rig.server.tail.settle()

        async def seen() -> bool:
            return hinted(await locate(address, tokens)) == {POOL_ID: 192}

        await eventually(seen)
        (found,) = (await locate(address, tokens)).locations
        assert (found.memsvc_id, found.memsvc_address, found.executor_incarnation) == ("a", rig.address, 7)
        assert hinted(await locate(address, tokens[:130] + prompt(70, 3))) == {POOL_ID: 128}
        assert hinted(await locate(address, tokens, tenant="someone else")) == {}
        assert hinted(await locate(address, tokens, model_id="another")) == {}
        own = await locate(rig.address, tokens)
        assert own.hints_searched
        assert [(item.pool_id, item.token_count, item.exact) for item in own.locations] == [(POOL_ID, 199, True)]
        # Eviction takes the hints with it.
        await rig.run(prompt(1000, 4))
        await rig.server.tail.settle()
        assert hinted(await locate(address, tokens)) == {}
        assert hinted(await locate(address, prompt(1000, 4))) == {POOL_ID: 960}
        await other.stop()


async def test_hints_of_a_service_that_stops_are_gone_at_once(server: RedisServer, secret: str) -> None:
    """Otherwise requests are sent to a service that said goodbye."""
    flush(server)
    watcher = MemsvcServer(test_config(store=server.url, memsvc_id="b", tenant_secret_file=secret))
    address = await watcher.start()
    tokens = prompt(200)
    async with service(server.url, secret, "a", lease_ttl=60.0, heartbeat_interval=0.5) as rig:
        await rig.run(tokens)

        async def seen() -> bool:
            watcher.locator._refresh_at = 0.0
            return hinted(await locate(address, tokens)) == {POOL_ID: 192}

        await eventually(seen)
    assert hinted(await locate(address, tokens)) == {}
    store = open_store(server.url)
    assert [record.name for record in await store.services("memsvc")] == ["b"]
    await store.close()
    await watcher.stop()


async def test_hints_of_a_service_that_is_killed_are_gone_with_its_lease(
    server: RedisServer, secret: str, tmp_path: Path
) -> None:
    """Otherwise the dead are recommended forever."""
    flush(server)
    flags = ("--store", server.url, "--memsvc-id", "killed", "--tenant-secret-file", secret, "--lease-ttl", "1.5")
    victim = start_service("memsvc", tmp_path, *flags)
    watcher = MemsvcServer(test_config(store=server.url, memsvc_id="b", tenant_secret_file=secret, lease_ttl=1.5))
    address = await watcher.start()
    tokens = prompt(200)
    try:
        await asyncio.to_thread(victim.wait_listening)
        await asyncio.to_thread(victim.wait_serving)
        epoch = await register(victim.address, POOL_ID, "h:1")
        gateway = StreamConnection(victim.address, "gateway-0")
        await gateway.start()
        admission = await gateway.admit(AdmitRequest(POOL_ID, epoch, "r", 0, pack(tokens)))
        await gateway.journal(
            JournalEntry(
                POOL_ID, epoch, [admission.table], [200], [0], [200], closed=[admission.table],
                close_reasons=[CloseReason.FINISHED],
            )
        )  # fmt: skip

        async def seen() -> bool:
            async with open_channel(victim.address) as channel:
                stub = memsvc_pb2_grpc.MemoryServiceStub(channel)
                await stub.Heartbeat(memsvc_pb2.HeartbeatRequest(executor_id=POOL_ID, executor_incarnation=7))
            return hinted(await locate(address, tokens)) == {POOL_ID: 192}

        await eventually(seen)
        victim.process.send_signal(signal.SIGKILL)
        victim.process.wait()
        assert hinted(await locate(address, tokens)) == {POOL_ID: 192}, "the lease is not over yet"

        async def gone() -> bool:
            return hinted(await locate(address, tokens)) == {}

        await eventually(gone)
        await gateway._stop()
    finally:
        victim.process.kill()
        victim.process.wait()
        await watcher.stop()


async def test_no_request_is_lost_while_the_store_is_killed_flushed_and_restarted(tmp_path: Path, secret: str) -> None:
    """Otherwise a convenience takes requests with it. Afterwards journal and hints are exactly those of the pool."""
    server = RedisServer(tmp_path)
    server.start()
    done, stop = 0, asyncio.Event()
    async with service(server.url, secret, "a", heartbeat_interval=0.1) as rig:
        assert rig.server is not None
        assert rig.server.tail is not None

        async def load() -> None:
            nonlocal done
            while not stop.is_set():
                await rig.run(prompt(40 + 16 * (done % 20), done % 37))
                done += 1

        async def more(count: int) -> None:
            target = done + count

            async def reached() -> bool:
                if running.done():
                    running.result()
                return done >= target

            await eventually(reached)

        running, alive = asyncio.create_task(load()), asyncio.create_task(keep_alive(rig, POOL_ID))
        await more(30)
        server.kill()
        await more(100)
        server.start()
        await more(50)
        for _ in range(3):
            flush(server)
            await more(30)
        stop.set()
        await running
        store = open_store(server.url)
        replica = Replica(store.journals, POOL_ID)

        async def exact() -> bool:
            published = rig.core.published(POOL_ID, with_tokens=False)
            expected = {
                block: published.identities[16 * row : 16 * row + 16]
                for row, block in enumerate(published.blocks.tolist())
            }
            known = await replica.catch_up()
            return known and {block: cached.identity for block, cached in replica.blocks.items()} == expected

        await eventually(exact)
        await rig.server.tail.settle()
        statistics = rig.server.tail.statistics()[POOL_ID]
        assert statistics["journal"].failure_count + statistics["journal"].fence_count

        async def registered() -> bool:
            return [record.name for record in await store.services("executor")] == [POOL_ID]

        await eventually(registered)
        alive.cancel()
        await asyncio.gather(alive, return_exceptions=True)
        await store.close()
    server.kill()


async def test_services_share_a_cluster(tmp_path: Path, secret: str) -> None:
    """Otherwise one script touches keys of two nodes and fails."""
    with running_cluster(tmp_path) as cluster:
        async with service(cluster.url, secret, "a", lease_ttl=30.0) as rig:
            watcher = MemsvcServer(test_config(store=cluster.url, memsvc_id="b", tenant_secret_file=secret))
            address = await watcher.start()
            tokens = prompt(300)
            await rig.run(tokens)

            async def seen() -> bool:
                return hinted(await locate(address, tokens)) == {POOL_ID: 256}

            await eventually(seen)
            await watcher.stop()


async def test_without_the_store_a_service_still_finds_its_own(tmp_path: Path, secret: str) -> None:
    """Otherwise a store that is down makes Locate fail."""
    server = RedisServer(tmp_path)
    async with service(server.url, secret, "a", lease_ttl=30.0) as rig:
        tokens = prompt(100)
        await rig.run(tokens)
        found = await locate(rig.address, tokens)
        assert not found.hints_searched
        assert [(item.pool_id, item.token_count) for item in found.locations] == [(POOL_ID, 99)]


@pytest.mark.parametrize(
    "fields", [{"token_ids": b""}, {"token_ids": b"123"}, {"token_ids": b"1234", "tenant": "x" * 513}]
)
async def test_a_prompt_that_cannot_be_is_refused(fields: dict[str, Any]) -> None:
    """Otherwise it is answered as if nobody had it."""
    running = MemsvcServer(test_config())
    async with open_channel(await running.start()) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await memsvc_pb2_grpc.MemoryServiceStub(channel).Locate(memsvc_pb2.LocateRequest(**fields), timeout=5)
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    await running.stop()


async def test_a_user_with_a_password_from_a_file(tmp_path: Path) -> None:
    """Otherwise the password has to be in the list of processes. The rights are those that the documents name."""
    password = tmp_path / "password"
    password.write_text("correct horse\n")
    users = tmp_path / "users.acl"
    digest = hashlib.sha256(b"correct horse").hexdigest()
    users.write_text(f"user default off\nuser quire on #{digest} ~quire:* +@read +@write +@scripting +@connection\n")
    with running_server(tmp_path, "--aclfile", str(users)) as server:
        store = open_store(server.url, Credentials(username="quire", password_file=str(password)))
        await store.start()
        assert await store.raise_epoch("p", 0) == 1
        await store.journals.begin("p", 1, "life", [b"s"])
        assert await store.journals.read("p", None, 1) is not None
        assert await store.hints.find("s", bytes(16)) == []
        await store.close()
        refused = open_store(server.url)
        with pytest.raises(StoreUnavailableError):
            await refused.raise_epoch("p", 0)
        await refused.close()


def certificate(directory: Path) -> tuple[Path, Path]:
    """Makes a certificate for 127.0.0.1 that signs itself, and its key."""
    certificate, key = directory / "server.pem", directory / "server.key"
    command = [
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
        *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


async def test_a_store_behind_tls_is_checked_against_its_certificate(server: RedisServer, tmp_path: Path) -> None:
    """Otherwise whoever sits in between reads and writes what services believe."""
    chain, key = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", server.port)
        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

    front = await asyncio.start_server(forward, "127.0.0.1", 0, ssl=context)
    url = f"rediss://127.0.0.1:{front.sockets[0].getsockname()[1]}/0"
    trusting = open_store(url, Credentials(ca_file=str(chain)))
    assert await trusting.raise_epoch("tls", 0) >= 1
    await trusting.close()
    doubting = open_store(url)
    with pytest.raises(StoreUnavailableError, match="certificate"):
        await doubting.raise_epoch("tls", 0)
    await doubting.close()
    front.close()
    await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"store": "redis://h:1/0", "store_ca_file": "x"}, "--store-ca-file"),
        ({"store": "rediss://h:1/0", "store_ca_file": "/nowhere"}, "--store-ca-file: no file"),
        ({"store": "redis://h:1/0", "store_password_file": "/nowhere"}, "--store-password-file"),
        ({"store_username": "u"}, "--store-username: is used only"),
        ({"store": "redis://:hunter2"}, "--store: the address cannot be read"),
    ],
)
def test_settings_of_the_store_that_cannot_be_are_refused(fields: dict[str, str], message: str) -> None:
    """Otherwise a typing error leaves a connection open to everybody, or shows a password."""
    with pytest.raises(ConfigError, match=message) as failure:
        MemsvcServer(test_config(**fields))
    assert "hunter2" not in str(failure.value)
