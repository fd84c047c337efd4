"""A container engine: the one that is there, or one of our own that leaves nothing behind.

Our own engine has its socket, its state and its process below RUN_DIRECTORY, and its images in the cache directory, so
that the next run finds them. What it did to the host's network is undone when it stops. A run that was killed leaves
`RUN_DIRECTORY/network.json`; the next run reads it and cleans up first.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
import dataclasses
import os
from pathlib import Path
import shutil
import signal
import subprocess
import time

from .console import CheckFailedError, EngineUnavailableError, run, say, succeeds
from .network import NetworkState

RUN_DIRECTORY = Path("/run/quire-compose-test")
_PACKAGES = {
    "docker": "docker.io",
    "dockerd": "docker.io",
    "debootstrap": "debootstrap",
    "iptables": "iptables",
    "ip": "iproute2",
}
_PROGRAMS = {"dockerd", "containerd", "containerd-shim-runc-v2"}
_START_SECONDS = 60
_STOP_SECONDS = 30


@dataclasses.dataclass(frozen=True, slots=True)
class Engine:
    """A reachable engine."""

    environment: Mapping[str, str]
    """Variables with which docker and compose find it."""
    own: bool
    """Whether this run started it."""

    def docker(self, *arguments: str, timeout: float = 60, log: Path | None = None) -> str:
        """Runs `docker ARGUMENTS` and returns its output; raises CheckFailedError if it fails."""
        return run(["docker", *arguments], timeout=timeout, env=self.environment, log=log)

    def has_image(self, name: str) -> bool:
        """Returns whether the image is in the engine's store."""
        return succeeds(["docker", "image", "inspect", name], timeout=30, env=self.environment)


@contextmanager
def reachable_engine(cache: Path) -> Iterator[Engine]:
    """Yields the engine that answers, or starts one and stops it afterwards.

    Raises:
        EngineUnavailableError: none answers and none can be started here; the message says why.
    """
    if shutil.which("docker") and succeeds(["docker", "version"], timeout=20):
        say("engine: one is running, using it")
        yield Engine(environment={}, own=False)
        return
    _require_programs()
    if RUN_DIRECTORY.exists():
        say("engine: an earlier run was killed, cleaning up after it")
        _clean_up()
    try:
        network = NetworkState.now()
    except CheckFailedError as error:
        raise EngineUnavailableError(f"the packet filter cannot be read here: {error}") from error
    RUN_DIRECTORY.mkdir(mode=0o700)
    (RUN_DIRECTORY / "network.json").write_text(network.to_json())
    (RUN_DIRECTORY / "data-root").write_text(str(cache / "engine"))
    try:
        yield _start(cache)
    finally:
        _clean_up()


def _require_programs() -> None:
    """Installs what an engine needs, if it is missing and this can be done."""
    if os.geteuid() != 0:
        raise EngineUnavailableError("no container engine answers, and only root can start one")
    missing = sorted({package for program, package in _PACKAGES.items() if not shutil.which(program)})
    if missing:
        if not shutil.which("apt-get"):
            raise EngineUnavailableError(f"no container engine answers, and {', '.join(missing)} cannot be installed")
        say(f"engine: installing {', '.join(missing)}")
        quiet = {"DEBIAN_FRONTEND": "noninteractive"}
        try:
            run(["apt-get", "update"], timeout=180, env=quiet)
            run(["apt-get", "install", "--yes", "--no-install-recommends", *missing], timeout=300, env=quiet)
        except CheckFailedError as error:
            raise EngineUnavailableError(f"{', '.join(missing)} cannot be installed: {error}") from error


def _start(cache: Path) -> Engine:
    """Starts dockerd and waits until it answers."""
    socket = f"unix://{RUN_DIRECTORY}/docker.sock"
    log = RUN_DIRECTORY / "dockerd.log"
    # Client settings of the user (credentials, plugins, contexts) are none of this engine's business.
    environment = {"DOCKER_HOST": socket, "DOCKER_CONFIG": str(RUN_DIRECTORY / "client"), "DOCKER_CONTEXT": ""}
    command = ["dockerd", "--host", socket, "--data-root", str(cache / "engine"), "--pidfile"]
    command += [str(RUN_DIRECTORY / "dockerd.pid"), "--exec-root", str(RUN_DIRECTORY / "exec")]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    deadline = time.monotonic() + _START_SECONDS
    while not succeeds(["docker", "version"], timeout=10, env=environment):
        if process.poll() is not None or time.monotonic() > deadline:
            tail = "\n".join(log.read_text().splitlines()[-15:])
            raise EngineUnavailableError(f"dockerd does not come up here:\n{tail}")
        time.sleep(0.25)
    version = run(["docker", "version", "--format", "{{.Server.Version}}"], timeout=20, env=environment).strip()
    say(f"engine: started dockerd {version} for this run, images in {cache / 'engine'}")
    return Engine(environment, own=True)


def _clean_up() -> None:
    """Stops the engine below RUN_DIRECTORY and undoes what it did."""
    pidfile = RUN_DIRECTORY / "dockerd.pid"
    daemons = [int(pidfile.read_text())] if pidfile.exists() else []
    _end(daemons, signal.SIGTERM)
    # containerd, the shims and the containers stay only if the daemon was killed.
    _end(_with_descendants(_our_processes()), signal.SIGKILL)
    for target in sorted(_our_mounts(), reverse=True):
        run(["umount", "--lazy", target], timeout=20)
    saved = RUN_DIRECTORY / "network.json"
    if saved.exists():
        NetworkState.from_json(saved.read_text()).restore()
    shutil.rmtree(RUN_DIRECTORY)


def _our_processes() -> list[int]:
    """Returns the engine's own programs: by name, and with RUN_DIRECTORY in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_text(errors="replace")
        except OSError:
            continue  # It ended meanwhile.
        program = Path(command.partition("\0")[0]).name
        if program in _PROGRAMS and f"{RUN_DIRECTORY}/" in command:
            found.append(int(entry.name))
    return found


def _with_descendants(pids: list[int]) -> list[int]:
    """Returns the processes and all that descend from them."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            stat = (entry / "stat").read_text()
        except OSError:
            continue  # It ended meanwhile.
        children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found = list(pids)
    for pid in found:
        found += [child for child in children.get(pid, []) if child not in found]
    return found


def _end(pids: list[int], number: signal.Signals) -> None:
    """Sends a signal and waits until the processes are gone, then kills what is left."""
    for pid in pids:
        _send(pid, number)
    deadline = time.monotonic() + _STOP_SECONDS
    while any(_is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in pids:
        if _is_running(pid):
            _send(pid, signal.SIGKILL)


def _send(pid: int, number: signal.Signals) -> None:
    """Sends a signal to a process that may already be gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        say(f"engine: process {pid} is already gone")


def _is_running(pid: int) -> bool:
    """Returns whether a process exists and is not a zombie waiting for us."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def _our_mounts() -> list[str]:
    """Returns the mount points that the engine made: below RUN_DIRECTORY, and its data directory and below."""
    roots = [RUN_DIRECTORY]
    record = RUN_DIRECTORY / "data-root"
    if record.exists():
        roots.append(Path(record.read_text()))
    targets = [Path(line.split()[4]) for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [str(target) for target in targets if any(target.is_relative_to(root) for root in roots)]
