"""The command log in files: written while the service runs, read afterwards, whatever became of the end."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
import stat

import pytest

from memsvc.config import MemsvcConfig
from memsvc.core.log import CommandLog
from memsvc.core.memory import MemoryCore
from memsvc.core.snapshot import digest
from memsvc.core.validation import PoolRegistration
from memsvc.log_files import LogFile, replay_file
from memsvc.recorder import LogRecorder
from memsvc.replay import describe
from memsvc.server import MemsvcServer
from quire.cli import main
from quire.columns import pack
from quire.errors import ConfigError, CorruptionError
from quire.memory import AdmitRequest, PoolSpec


def busy(turns: int, core: MemoryCore | None = None) -> tuple[MemoryCore, CommandLog]:
    """Returns a core that has admitted `turns` sequences since its log began."""
    core = core if core is not None else MemoryCore(b"secret of this test")
    log = CommandLog(core, 1 << 24)
    core.register_pool(PoolRegistration("executor", 7, "h:1", PoolSpec(200, 16, 1, "m", "float32", 160)), 1, 1.0)
    core.connect_gateway("one", 11, 2.0)
    for turn in range(turns):
        core.admit(1, AdmitRequest("executor", 1, f"r{turn}", 0, pack([turn] * 20), tenant="t"), 3.0 + turn)
    return core, log


def written(tmp_path: Path, log: CommandLog) -> Path:
    """Returns the file of a log's only segment, not ended in good order."""
    (segment,) = log.segments
    file = LogFile(tmp_path / "one.quirelog", segment)
    file.write(len(segment.lines))
    file.close()
    return file.path


def only(folder: Path) -> Path:
    """Returns the only file in a folder."""
    (path,) = folder.iterdir()
    return path


def test_a_file_gives_the_state_at_any_command(tmp_path: Path) -> None:
    """Otherwise a report's state cannot be looked at where it went wrong."""
    core, log = busy(5)
    path = written(tmp_path, log)
    whole = replay_file(path)
    assert (whole.count, whole.is_torn, whole.is_checked) == (len(log.segments[0].lines), False, False)
    assert digest(whole.core) == digest(core)
    some = replay_file(path, whole.count - 2)
    assert [sequence["sequence_id"] for sequence in describe(some)["sequences"]] == ["r0/0", "r1/0", "r2/0"]
    assert describe(some)["last_at"] == 5.0
    assert replay_file(path, 0).core.pools == {}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_breaks_off_counts_up_to_there(tmp_path: Path) -> None:
    """A service that is killed leaves half a frame, and its log is wanted then most of all."""
    _, log = busy(3)
    data = written(tmp_path, log).read_bytes()
    torn = tmp_path / "torn.quirelog"
    counts = []
    for size in range(len(data) - 1, len(data) - 400, -7):
        torn.write_bytes(data[:size])
        replayed = replay_file(torn)
        assert replayed.is_torn or size == len(data)
        counts.append(replayed.count)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == len(log.segments[0].lines) - 1


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    """Damage in the middle would give a state that never was."""
    _, log = busy(3)
    data = written(tmp_path, log).read_bytes()
    bad = tmp_path / "bad.quirelog"
    for at in (60, len(data) // 2, len(data) - 200):
        bad.write_bytes(data[:at] + bytes((data[at] ^ 0xFF,)) + data[at + 1 :])
        with contextlib.suppress(CorruptionError):
            # A length that says more than there is reads like a file that breaks off.
            assert replay_file(bad).is_torn
    for content, message in (
        (b"", "not a command log"),
        (b"QUIRELOG\x09\0\0\0", "version 9"),
        (data[:30], "breaks off"),
    ):
        bad.write_bytes(content)
        with pytest.raises((ConfigError, CorruptionError), match=message):
            replay_file(bad)
    with pytest.raises(ConfigError, match="No such file"):
        replay_file(tmp_path / "none")


def test_a_file_of_another_state_is_noticed(tmp_path: Path) -> None:
    """The service's own digest is the proof that the replay is right."""
    core, log = busy(3)
    (segment,) = log.segments
    file = LogFile(tmp_path / "one.quirelog", segment)
    file.write(len(segment.lines) - 1)
    file.finish(core)
    with pytest.raises(CorruptionError, match="another state than the service had"):
        replay_file(file.path)


async def test_a_recorder_follows_the_log_and_keeps_within_its_bytes(tmp_path: Path) -> None:
    """Otherwise a flight recorder fills the disk, or misses what was dropped from memory."""
    core, log = busy(2)
    recorder = LogRecorder(log, core, tmp_path / "deep" / "down", "mem/svc", 1)
    for turn in range(3):
        await recorder._write()
        assert log.rotate()
        core.touch_gateway(1, 100.0 + turn)
    recorder.start()
    await recorder.close()
    last = only(tmp_path / "deep" / "down")
    assert last.name.startswith("mem%2Fsvc-")
    replayed = replay_file(last)
    assert replayed.is_checked
    assert digest(replayed.core) == digest(core)
    assert replayed.first + replayed.count == log.end


async def test_a_service_writes_what_a_replay_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way: the service's option, its file, and the command of an operator."""
    server = MemsvcServer(MemsvcConfig(port=0, log_dir=str(tmp_path), lease_ttl=30.0))
    await server.start()
    core = server.keeper.core
    core.register_pool(PoolRegistration("executor", 7, "h:1", PoolSpec(20, 16, 1, "m", "float32", 160)), 1, 1.0)
    core.connect_gateway("one", 11, 2.0)
    core.admit(1, AdmitRequest("executor", 1, "r", 0, pack([1] * 50)), 3.0)
    expected = digest(core).hex()
    await server.stop()
    path = only(tmp_path)
    capsys.readouterr()
    assert main.run(["replay", str(path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["digest"], document["checked"], document["torn"]) == (expected, True, False)
    assert document["sequences"][0]["block_ids"] == [1, 2, 3, 4]
    assert main.run(["replay", str(path)]) == 0
    shown = capsys.readouterr()
    assert "r/0" in shown.out and "1-4" in shown.out
    assert "equal to the state that the service had" in shown.err
    assert main.run(["replay", str(tmp_path / "none")]) == 2
    assert "No such file" in capsys.readouterr().err


async def test_a_recorder_whose_log_ends_leaves_what_it_has(tmp_path: Path) -> None:
    """A pool that is too large for the log must not spoil the file of what was before."""
    core = MemoryCore(b"secret of this test")
    log = CommandLog(core, 1 << 14)
    recorder = LogRecorder(log, core, tmp_path, "memsvc", 1 << 20)
    await recorder._write()
    recorder.start()
    core.register_pool(PoolRegistration("executor", 7, "h:1", PoolSpec(200, 16, 1, "m", "float32", 160)), 1, 1.0)
    for turn in range(100):
        core.heartbeat("executor", 7, 2.0 + turn)
    assert log.ended
    await recorder.close()
    assert not replay_file(only(tmp_path)).is_checked


def test_a_directory_that_cannot_be_is_a_wrong_setting(tmp_path: Path) -> None:
    """Found at the start, not when the log is wanted."""
    (tmp_path / "file").write_text("")
    core, log = busy(0)
    with pytest.raises(ConfigError, match="--log-dir"):
        LogRecorder(log, core, tmp_path / "file" / "below", "memsvc", 1)
    with pytest.raises(ConfigError, match="--command-log-mib 0"):
        MemsvcConfig(log_dir=str(tmp_path), command_log_mib=0).check()
