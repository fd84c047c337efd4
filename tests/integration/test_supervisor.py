"""The supervisor on real processes: order, restarts, failures, and nothing left behind."""

import asyncio
from collections.abc import Callable
import dataclasses
import os
from pathlib import Path
import signal
import sys
import time

import pytest

from quire.errors import ConfigError, DeadlineError, NotReadyError
from quire.serve import plan
from quire.serve.plan import ServiceProcess
from quire.serve.readiness import Progress
from quire.serve.supervisor import Supervisor, restart_delay

SERVICE = Path(__file__).with_name("supervised_service.py")
NAMES = ("memsvc", "execsvc", "gateway")


@dataclasses.dataclass
class Recorder:
    """Keeps what the supervisor reports."""

    phases: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    loud: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def progress(self, service: str, progress: Progress) -> None:
        """Keeps a phase."""
        self.phases.append((service, progress.phase))

    def log_line(self, service: str, line: str, *, loud: bool) -> None:
        """Keeps a loud line."""
        if loud:
            self.loud.append(f"{service}: {line}")

    def note(self, text: str) -> None:
        """Keeps a remark."""
        self.notes.append(text)


class Stage:
    """Three services to supervise, and what happened."""

    def __init__(self, directory: Path, behaviours: dict[str, str]) -> None:
        """Plans the services on free ports."""
        self.directory = directory
        self.journal_path = directory / "journal"
        self.recorder = Recorder()
        self.processes = []
        self.pids: set[int] = set()
        for name in NAMES:
            port = plan.choose_port("127.0.0.1", 0, "--port")
            argv = (sys.executable, str(SERVICE), name, str(port), str(self.journal_path), behaviours.get(name, ""))
            self.processes.append(ServiceProcess(name, f"127.0.0.1:{port}", argv, dict(os.environ), drain_grace=1.0))

    def supervisor(self, timeout: float = 30.0, delay: Callable[[int], float] = lambda _: 0.01) -> Supervisor:
        """Returns a supervisor of the services."""
        return Supervisor(self.processes, self.directory / "logs", self.recorder, timeout, delay)

    def journal(self) -> list[str]:
        """Returns what the services noted."""
        return self.journal_path.read_text().splitlines() if self.journal_path.exists() else []

    def left_processes(self) -> list[str]:
        """Returns the command lines of services of this stage that still run."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                text = path.read_bytes().decode(errors="replace")
            except OSError:
                continue
            if str(self.journal_path) in text:
                found.append(text)
        return found


async def nothing() -> None:
    """Does nothing."""


async def until(condition: Callable[[], object]) -> None:
    """Waits up to ten seconds until `condition` holds."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.02)


async def test_services_start_in_order_and_stop_in_reverse(tmp_path: Path) -> None:
    """A gateway that drains after its memory is gone would cut off the answers it still streams."""
    stage = Stage(tmp_path, {})
    supervisor = stage.supervisor()
    seen: list[dict[str, int]] = []

    async def body() -> None:
        seen.append(supervisor.pids())

    await supervisor.run(body)
    assert stage.journal()[0] == "memsvc started"
    assert stage.journal()[3:] == ["gateway stopped", "execsvc stopped", "memsvc stopped"]
    assert set(seen[0]) == set(NAMES)
    assert {service for service, phase in stage.recorder.phases if phase == "ready"} == set(NAMES)
    assert not stage.left_processes()
    assert (tmp_path / "logs" / "execsvc.log").read_text().count("service_stopped") == 1


@pytest.mark.parametrize(
    ("behaviour", "error", "text"),
    [
        ("bad-setting", ConfigError, "execsvc: --store: 'x' is not a store"),
        ("bad-model", NotReadyError, "execsvc: no model at /nowhere"),
    ],
)
async def test_a_service_that_refuses_to_start_ends_it_all_in_its_own_words(
    tmp_path: Path, behaviour: str, error: type[Exception], text: str
) -> None:
    """Starting it again would hide the one line that says what to change."""
    stage = Stage(tmp_path, {"execsvc": behaviour})
    with pytest.raises(error) as caught:
        await stage.supervisor().run(nothing)
    assert str(caught.value) == text
    assert not stage.recorder.notes
    assert not stage.left_processes()


async def test_a_service_that_dies_is_started_again(tmp_path: Path) -> None:
    """One crash at night must not end the service until morning."""
    stage = Stage(tmp_path, {})
    supervisor = stage.supervisor()

    async def body() -> None:
        first = supervisor.pids()["execsvc"]
        os.kill(first, signal.SIGKILL)
        await until(lambda: supervisor.pids().get("execsvc", first) != first)
        await until(lambda: stage.journal().count("execsvc started") == 2)

    await supervisor.run(body)
    assert stage.recorder.notes == ["execsvc was killed by SIGKILL; starting it again in 0.01 s"]
    assert not stage.left_processes()


async def test_a_service_that_keeps_dying_ends_it_all(tmp_path: Path) -> None:
    """A service in a restart loop looks alive to a supervisor above and serves nobody."""
    stage = Stage(tmp_path, {"execsvc": "crash-later"})
    with pytest.raises(
        NotReadyError, match="execsvc was killed by SIGKILL: RuntimeError: the device is gone"
    ) as caught:
        await stage.supervisor().run(asyncio.Event().wait)  # type: ignore[arg-type]
    assert stage.journal().count("execsvc started") == 6
    assert caught.value.metadata["log"].endswith("execsvc.log")
    assert not stage.left_processes()


async def test_a_start_that_takes_too_long_says_who_is_late(tmp_path: Path) -> None:
    """Waiting for ever in silence is the worst answer."""
    stage = Stage(tmp_path, {"gateway": "never-healthy"})
    # On a busy machine the others may be late as well: then they get more time.
    for timeout in (3, 40):
        with pytest.raises(DeadlineError, match=rf"within {timeout} s: .*gateway is ") as late:
            await stage.supervisor(timeout=timeout).run(nothing)
        assert not stage.left_processes()
        if "execsvc" not in str(late.value):
            break
    assert f"within {timeout} s: gateway is waiting for an executor" in str(late.value)


async def test_a_stop_during_the_start_leaves_nothing(tmp_path: Path) -> None:
    """People press Ctrl-C when they see that they gave the wrong model."""
    stage = Stage(tmp_path, {"gateway": "never-healthy"})
    supervisor = stage.supervisor()
    run = asyncio.create_task(supervisor.run(nothing))
    await until(lambda: "gateway started" in stage.journal())
    supervisor.request_stop()
    await run
    assert not stage.left_processes()


async def test_a_service_that_does_not_drain_is_killed(tmp_path: Path) -> None:
    """A hung process must not keep the terminal, nor the port."""
    stage = Stage(tmp_path, {"gateway": "deaf"})
    supervisor = stage.supervisor()
    run = asyncio.create_task(supervisor.run(nothing))
    await until(lambda: "gateway started" in stage.journal())
    begun = time.monotonic()
    supervisor.request_stop()
    await asyncio.sleep(0.2)
    supervisor.request_stop()
    await run
    assert time.monotonic() - begun < 5
    assert stage.recorder.notes == ["killing what is still running"]
    assert not stage.left_processes()


async def test_a_failure_of_the_work_stops_the_services_and_is_told(tmp_path: Path) -> None:
    """`quire demo` that fails must fail, and clean up."""
    stage = Stage(tmp_path, {})

    async def body() -> None:
        raise ValueError("the work failed")

    with pytest.raises(ValueError, match="the work failed"):
        await stage.supervisor().run(body)
    assert not stage.left_processes()


async def test_the_log_of_the_run_before_is_kept_once(tmp_path: Path) -> None:
    """The log that says why the last run ended is the one people look for."""
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "memsvc.log").write_text("the run before\n")
    await Stage(tmp_path, {}).supervisor().run(nothing)
    assert (logs / "memsvc.log.1").read_text() == "the run before\n"
    assert "the run before" not in (logs / "memsvc.log").read_text()


def test_restarts_slow_down() -> None:
    """A service that fails at once must not burn a core on failing."""
    assert [restart_delay(count) for count in range(6)] == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0]
