"""What `quire serve` starts."""

import os
from pathlib import Path
import socket

import pytest

from execsvc.config import ExecsvcConfig
from gateway.config import GatewayConfig
from memsvc.config import MemsvcConfig
from quire.config import load
from quire.errors import ConfigError
from quire.serve.child import last_error
from quire.serve.plan import ServeOptions, ServiceProcess, plan_processes, resolve_model


def planned(**options: object) -> dict[str, ServiceProcess]:
    """Returns the processes for "smollm2" on free ports, by name."""
    wanted = ServeOptions(model="smollm2", port=0, memsvc_port=0, execsvc_port=0, **options)  # type: ignore[arg-type]
    return {process.name: process for process in plan_processes(wanted)}


def flag(process: ServiceProcess, name: str) -> str | None:
    """Returns the value of a flag, None if it is not given."""
    return process.argv[process.argv.index(name) + 1] if name in process.argv else None


def test_the_services_find_one_another() -> None:
    """A wrong address here is a start that waits until its deadline."""
    found = planned()
    assert list(found) == ["memsvc", "execsvc", "gateway"]
    assert flag(found["execsvc"], "--memsvc") == flag(found["gateway"], "--memsvc") == found["memsvc"].address
    for process in found.values():
        assert f"{flag(process, '--host')}:{flag(process, '--port')}" == process.address
    assert len({process.address for process in found.values()}) == 3


def test_every_option_goes_to_the_services_that_have_it() -> None:
    """A flag that a service does not know ends it; one that is not passed on is ignored."""
    settings = {
        "kv_cache_bytes": "1GiB",
        "max_num_seqs": "8",
        "store": "redis://x:1/0",
        "enable_prefix_caching": "false",
    }
    found = planned(settings=settings)
    assert flag(found["execsvc"], "--kv-cache-bytes") == "1GiB"
    assert flag(found["execsvc"], "--max-num-seqs") == flag(found["gateway"], "--max-num-seqs") == "8"
    assert flag(found["memsvc"], "--store") == "redis://x:1/0"
    assert "--no-enable-prefix-caching" in found["gateway"].argv
    assert flag(found["memsvc"], "--max-num-seqs") is None
    assert flag(found["gateway"], "--store") is None


def test_only_the_gateway_leaves_loopback() -> None:
    """The memory service and the executor trust their callers."""
    found = planned(host="0.0.0.0")
    assert flag(found["gateway"], "--host") == "0.0.0.0"
    assert found["gateway"].address.startswith("127.0.0.1:")
    assert flag(found["memsvc"], "--host") == flag(found["execsvc"], "--host") == "127.0.0.1"


def test_one_process_gets_the_settings_of_all() -> None:
    """In one process there is only the gateway's command line; the others read variables."""
    (process,) = planned(in_process=True, settings={"dtype": "float32", "store": "memory://"}).values()
    assert "--in-process" in process.argv
    assert process.environment["QUIRE_EXECSVC_MODEL"] == "smollm2"
    assert process.environment["QUIRE_EXECSVC_DTYPE"] == "float32"
    assert "--dtype" not in process.argv


def test_variables_of_the_command_line_are_no_settings_of_a_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable for `quire blocks` must not stop a service that refuses settings it does not know."""
    for name in ("QUIRE_ADMIN_ADDRESS", "QUIRE_ADDRESS"):
        monkeypatch.setenv(name, "127.0.0.1:1")
        for service, config in (("memsvc", MemsvcConfig), ("execsvc", ExecsvcConfig), ("gateway", GatewayConfig)):
            load(config, service, [], os.environ)


def test_a_port_in_use_is_refused_before_anything_starts() -> None:
    """Otherwise the model is loaded for a minute, and then the last service fails."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: address already in use") as caught:
            plan_processes(ServeOptions(model="smollm2", port=port, memsvc_port=0, execsvc_port=0))
    assert (caught.value.reason, caught.value.field) == ("PORT_IN_USE", "--port")


def test_a_relative_model_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log directory of a service may lie elsewhere; its model must not move with it."""
    (tmp_path / "model.gguf").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("model.gguf") == str(tmp_path / "model.gguf")
    with pytest.raises(ConfigError, match="neither a GGUF file"):
        resolve_model("missing.gguf")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], ""),
        (["quire execsvc: no model at /x"], "no model at /x"),
        (["memsvc: --store: unknown"], "--store: unknown"),
        (["usage: quire execsvc", "quire execsvc: error: unrecognized arguments: --x"], "unrecognized arguments: --x"),
        (['{"level": "info", "event": "config_loaded"}'], ""),
        (['{"level": "error", "event": "device_lost", "error": "out of memory"}'], "out of memory"),
        (["Traceback (most recent call last):", "  File x", "KeyError: 'a'"], "KeyError: 'a'"),
        (["KV cache   1.0 GiB   1455 blocks"], ""),
        (["quire execsvc: the reason", '{"level": "info", "event": "service_stopped"}'], "the reason"),
    ],
)
def test_the_last_words_of_a_service_are_found(lines: list[str], expected: str) -> None:
    """They are the one line that a user gets to see."""
    assert last_error(lines) == expected
