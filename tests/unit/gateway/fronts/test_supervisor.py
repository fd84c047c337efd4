"""The processes of a gateway: its port is its own, and what cannot run is not started for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
import socket
import sys
import time

import pytest

from gateway.config import GatewayConfig
from gateway.fronts import supervisor as module
from gateway.fronts.supervisor import FrontSupervisor, reserve_port, socket_directory
from quire.errors import ConfigError


def test_a_port_that_is_reserved_is_shared_with_those_who_ask_for_that_alone() -> None:
    """Fronts have to find it free; a stranger must not, nor another gateway."""
    with reserve_port("127.0.0.1", 0) as reserved:
        port = reserved.getsockname()[1]
        with socket.socket() as front:
            front.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            front.bind(("127.0.0.1", port))
            front.listen()
            # The reservation listens to nobody: every connection is the front's.
            for _ in range(8):
                with socket.create_connection(("127.0.0.1", port), timeout=5):
                    front.accept()[0].close()
            with pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1:{port}: .*; choose --port"):
                reserve_port("127.0.0.1", port)
            with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
                stranger.bind(("127.0.0.1", port))


def test_the_engine_can_be_reached_by_its_own_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reaches it speaks for every tenant."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with socket_directory() as directory:
        assert Path(directory).stat().st_mode & 0o777 == 0o700
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("place", "message"), [("nowhere", "set TMPDIR to one that is"), ("x" * 90, "to a shorter one")]
)
def test_a_place_where_no_socket_can_be_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, message: str
) -> None:
    """The engine would otherwise fail to listen again and again, for a reason that its fronts cannot tell."""
    (tmp_path / ("x" * 90)).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / place))
    with pytest.raises(ConfigError, match=message):
        socket_directory()
    assert not list((tmp_path / ("x" * 90)).iterdir())


def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> FrontSupervisor:
    """Returns a supervisor whose workers are a program, which has the name of its worker in `name`."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import sys, time, pathlib\n"
        "name = sys.argv[sys.argv.index('--worker') + 1]\n"
        f"with pathlib.Path({str(tmp_path / 'journal')!r}).open('a') as journal:\n"
        "    journal.write(name + '\\n')\n"
        f"{program}\n"
    )
    monkeypatch.setattr(module, "worker_command", lambda: (sys.executable, str(script)))
    monkeypatch.setattr(module, "restart_delay", lambda _: 0.01)
    config = GatewayConfig(api_server_count=2, port=1, gateway_id="g", drain_grace=0.5)
    return FrontSupervisor(config, [], "unix:nowhere")


def journal(tmp_path: Path) -> list[str]:
    """Returns the names of the workers that were started, in order."""
    path = tmp_path / "journal"
    return path.read_text().splitlines() if path.exists() else []


async def until(condition: Callable[[], object]) -> None:
    """Waits until something holds."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.02)


async def test_a_worker_with_wrong_settings_ends_it_all_with_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started again it would be as wrong, and its one line would be lost among many."""
    supervisor = workers(tmp_path, monkeypatch, "sys.exit(2) if name == 'engine' else time.sleep(60)")
    assert await asyncio.wait_for(supervisor.run(), 20) == 2
    assert journal(tmp_path).count("engine") == 1


async def test_a_worker_that_keeps_dying_ends_it_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway in a restart loop looks alive to whoever supervises it, and serves nobody."""
    program = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL) if name == 'front-1' else time.sleep(60)"
    supervisor = workers(tmp_path, monkeypatch, program)
    assert await asyncio.wait_for(supervisor.run(), 20) == 1
    assert journal(tmp_path).count("front-1") == 6
    assert journal(tmp_path).count("front-0") == 1


async def test_fronts_end_before_the_engine_and_who_does_not_drain_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that went first would cut off every answer; a hung process must not keep the port."""
    monkeypatch.setattr(module, "_STOP_MARGIN_SECONDS", 0.5)
    program = (
        "import signal\n"
        "def end(*_):\n"
        f"    with pathlib.Path({str(tmp_path / 'journal')!r}).open('a') as journal:\n"
        "        journal.write(name + ' ends\\n')\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end if name != 'front-0' else signal.SIG_IGN)\n"
        f"with pathlib.Path({str(tmp_path / 'journal')!r}).open('a') as journal:\n"
        "    journal.write(name + ' ready\\n')\n"
        "time.sleep(60)"
    )
    supervisor = workers(tmp_path, monkeypatch, program)
    run = asyncio.create_task(supervisor.run())
    await until(lambda: sum(line.endswith(" ready") for line in journal(tmp_path)) == 3)
    begun = time.monotonic()
    supervisor.request_stop("test")
    assert await asyncio.wait_for(run, 20) == 0
    assert time.monotonic() - begun >= 1.0
    assert [line for line in journal(tmp_path) if line.endswith(" ends")] == ["front-1 ends", "engine ends"]
