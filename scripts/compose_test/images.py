"""The images that the stack is built on: pulled where a registry answers, else made here from Debian packages.

A substitute never takes a public name. It is Debian 12 with its own Python 3.11 and Redis 7.0, called SUBSTITUTE, and
the compose file's QUIRE_COMPOSE_PYTHON_IMAGE and QUIRE_COMPOSE_REDIS_IMAGE point at it.
"""

import os
from pathlib import Path
import shutil
import subprocess
import tempfile

from .console import CheckFailedError, EngineUnavailableError, run, say
from .engine import Engine

PYTHON_IMAGE = "python:3.11-slim"
REDIS_IMAGE = "valkey/valkey:8.1-bookworm"
SUBSTITUTE = "quire-compose-test/debian:12"
_SUITE = "bookworm"
_PACKAGES = "ca-certificates,python3-venv,redis-server"
# The account and the directory that the compose file expects of a Redis image.
_REDIS_ACCOUNT = 999
_PULL_SECONDS = 180
_BOOTSTRAP_SECONDS = 420


def provide_images(engine: Engine, log: Path) -> dict[str, str]:
    """Makes sure that the base images are in the engine's store; returns the compose variables that name them.

    Raises:
        EngineUnavailableError: no registry answers and a substitute cannot be made here.
    """
    if all(engine.has_image(name) or _pulled(engine, name) for name in (PYTHON_IMAGE, REDIS_IMAGE)):
        return {"QUIRE_COMPOSE_PYTHON_IMAGE": PYTHON_IMAGE, "QUIRE_COMPOSE_REDIS_IMAGE": REDIS_IMAGE}
    if engine.has_image(SUBSTITUTE):
        say(f"images: no registry answers, {SUBSTITUTE} from an earlier run stands in for {PYTHON_IMAGE} and Redis")
    else:
        say(f"images: no registry answers, building {SUBSTITUTE} from Debian packages (about a minute)")
        if os.geteuid() != 0 or not shutil.which("debootstrap"):
            raise EngineUnavailableError("no registry answers, and a base image is only made by root with debootstrap")
        try:
            _bootstrap(engine, log)
        except CheckFailedError as error:
            raise EngineUnavailableError(f"no registry answers, and debootstrap fails: {error}") from error
    return {"QUIRE_COMPOSE_PYTHON_IMAGE": SUBSTITUTE, "QUIRE_COMPOSE_REDIS_IMAGE": SUBSTITUTE}


def _pulled(engine: Engine, name: str) -> bool:
    """Tries to pull an image."""
    try:
        engine.docker("pull", "--quiet", name, timeout=_PULL_SECONDS)
    except CheckFailedError:
        return False
    say(f"images: pulled {name}")
    return True


def _bootstrap(engine: Engine, log: Path) -> None:
    """Imports a fresh Debian with Python and Redis as an image."""
    with tempfile.TemporaryDirectory(prefix="quire-bootstrap-") as name:
        root = Path(name, "root")
        # debootstrap's own default mirror; http_proxy is honoured.
        command = ["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", _SUITE, str(root)]
        run(command, timeout=_BOOTSTRAP_SECONDS, log=log)
        for leftover in (*root.glob("var/cache/apt/archives/*.deb"), *root.glob("var/lib/apt/lists/*_*")):
            leftover.unlink()
        for unread in ("usr/share/doc", "usr/share/locale"):
            shutil.rmtree(root / unread)
        # Of the host, not of the image.
        (root / "etc/resolv.conf").unlink(missing_ok=True)
        (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
        (root / "data").mkdir()
        shutil.chown(root / "data", _REDIS_ACCOUNT, _REDIS_ACCOUNT)
        _import(engine, root)


def _import(engine: Engine, root: Path) -> None:
    """Makes an image of a directory tree."""
    environment = [
        "--change",
        "ENV PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8",
        "--change",
        "WORKDIR /data",
    ]
    with tempfile.TemporaryFile() as archive:
        subprocess.run(["tar", "-C", str(root), "-c", "."], stdout=archive, check=True, timeout=120)
        archive.seek(0)
        subprocess.run(
            ["docker", "import", *environment, "-", SUBSTITUTE],
            stdin=archive,
            stdout=subprocess.DEVNULL,
            check=True,
            timeout=180,
            env={**os.environ, **engine.environment},
        )
