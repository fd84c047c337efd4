"""`quire serve` and `quire demo` as a user runs them: they start, they say what is wrong, they leave nothing behind."""

from collections.abc import Iterator
import contextlib
import dataclasses
import os
from pathlib import Path
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from quire import Client
from quire.healthcheck import check

QUIRE = (sys.executable, "-m", "quire.cli.main")
START_SECONDS = 90.0
SMALL = ("--kv-cache-tokens", "2048", "--max-model-len", "1024")


def processes_in(directory: Path) -> list[str]:
    """Returns the command lines of processes that work in `directory`: everything that a test has started there."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if process.joinpath("cwd").resolve() == directory:
                found.append(process.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode())
    return [line for line in found if line]


def child_of(parent: int, service: str) -> int:
    """Returns the process id of a service that `parent` has started."""
    for children in Path(f"/proc/{parent}/task").glob("*/children"):
        for child in children.read_text().split():
            if f"-m\0{service}\0" in Path(f"/proc/{child}/cmdline").read_text():
                return int(child)
    raise LookupError(service)


@dataclasses.dataclass
class Serving:
    """A running `quire serve`."""

    process: subprocess.Popen[bytes]
    output_path: Path

    def output(self) -> str:
        """Returns what it has printed."""
        return self.output_path.read_text()

    def address(self) -> str:
        """Waits for the banner and returns the gateway's address."""
        deadline = time.monotonic() + START_SECONDS
        while not (found := re.search(r"Quire serves \S+ at (\S+)", self.output())):
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.1)
        return found[1]


@contextlib.contextmanager
def serving(directory: Path, *flags: str) -> Iterator[Serving]:
    """Yields a `quire serve` of the demo model on free ports; kills what is left of it."""
    output_path = directory / "output"
    ports = ("--port", "0", "--memsvc-port", "0", "--execsvc-port", "0")
    command = [*QUIRE, "serve", "--model", "smollm2", *ports, *SMALL, *flags]
    with output_path.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=directory, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield Serving(process, output_path)
    finally:
        process.kill()
        process.wait(30)


def wait_until_gone(directory: Path, seconds: float) -> None:
    """Waits until no process works in `directory`."""
    deadline = time.monotonic() + seconds
    while left := processes_in(directory):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    return subprocess.run([*QUIRE, *arguments], cwd=directory, capture_output=True, text=True, timeout=120, check=False)


def test_serve_answers_survives_a_crash_and_leaves_nothing_at_ctrl_c(tmp_path: Path) -> None:
    """The life of `make up`: its first answer, a service that dies, Ctrl-C."""
    with serving(tmp_path) as server:
        address = server.address()
        assert f" chat --address {address}\n" in server.output()
        # How far loading is comes between the two, if it takes long enough to be asked.
        assert re.search(r"execsvc: starting\n(.*\n)*execsvc: ready\n", server.output())
        with Client(address) as client:
            first = client.generate("The capital of France is", max_tokens=8, temperature=0).text
            assert "Paris" in first
            (executor,) = [line for line in processes_in(tmp_path) if " -m execsvc " in line]
            os.kill(child_of(server.process.pid, "execsvc"), signal.SIGKILL)
            assert client.generate("The capital of France is", max_tokens=8, temperature=0, timeout=90).text == first
        assert "execsvc was killed by SIGKILL; starting it again in 0.5 s" in server.output()
        assert executor in processes_in(tmp_path)
        # A terminal sends it to the whole group of the foreground; the services are in groups of their own.
        os.killpg(server.process.pid, signal.SIGINT)
        assert server.process.wait(40) == 0
        assert not processes_in(tmp_path)
        assert server.output().rstrip().endswith("stopped")
    assert "service_stopped" in (tmp_path / ".quire" / "logs" / "memsvc.log").read_text()


def test_the_services_end_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    """Out of memory kills without asking; the ports and the memory must be free for the next start."""
    with serving(tmp_path) as server:
        address = server.address()
        server.process.kill()
        server.process.wait(10)
        wait_until_gone(tmp_path, 30)
        assert check(address) == "UNAVAILABLE"


def test_one_process_serves_the_same(tmp_path: Path) -> None:
    """A notebook user wants one process, not three."""
    with serving(tmp_path, "--in-process") as server:
        with Client(server.address()) as client:
            assert "Paris" in client.generate("The capital of France is", max_tokens=8, temperature=0).text
        assert len([line for line in processes_in(tmp_path) if " -m gateway " in line]) == 1
        assert not [line for line in processes_in(tmp_path) if " -m execsvc " in line]
        server.process.terminate()
        assert server.process.wait(40) == 0
    assert not processes_in(tmp_path)


def test_a_port_in_use_is_one_line_and_a_hint(tmp_path: Path) -> None:
    """The second `make up` on a machine is the usual cause."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run(tmp_path, "serve", "--model", "smollm2", "--port", str(port))
    assert done.returncode == 2
    first, second = done.stderr.splitlines()
    assert first == f"error: cannot listen on 127.0.0.1:{port}: address already in use"
    assert second.startswith("hint: choose another with --port")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.gguf", b"", "empty.gguf"),
        ("text.gguf", b"this is no model at all, but a text\n" * 10, "text.gguf"),
        ("pytorch_model.bin", b"\x80\x02pickle", "pickle"),
    ],
)
def test_what_is_no_model_ends_the_start_at_once(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    """The reason must be on the terminal, in one line, not in a log file after a timeout."""
    (tmp_path / name).write_bytes(content)
    ports = ("--port", "0", "--memsvc-port", "0", "--execsvc-port", "0")
    done = run(tmp_path, "serve", "--model", name, *ports)
    assert done.returncode in {1, 2}
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert expected in errors[0]
    assert "Traceback" not in done.stderr
    assert not processes_in(tmp_path)


def test_a_setting_that_a_service_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    """The supervisor passes options on and knows nothing of their ranges."""
    ports = ("--port", "0", "--memsvc-port", "0", "--execsvc-port", "0")
    done = run(tmp_path, "serve", "--model", "smollm2", *ports, "--store", "ftp://nowhere")
    assert done.returncode == 2
    assert re.search(r"^error: memsvc: .*store", done.stderr, re.MULTILINE)
    assert not processes_in(tmp_path)


def test_the_demo_shows_an_answer_and_a_table_that_matches(tmp_path: Path) -> None:
    """The first impression: a sensible answer, and memory that adds up."""
    done = run(tmp_path, "demo", "What is the capital of France?", "--max-tokens", "40")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert re.search(r"(\d+) tokens / 16 a block = (\d+) blocks, and the table has \2: as it should be", done.stdout)
    assert not processes_in(tmp_path)
