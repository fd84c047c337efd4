"""What `quire serve` starts: which processes, with which flags, on which ports."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import os
from pathlib import Path
import socket
import sys
from typing import Final

from quire.errors import ConfigError

GATEWAY_PORT: Final = 50051
MEMSVC_PORT: Final = 50061
EXECSVC_PORT: Final = 50071
LOOPBACK: Final = "127.0.0.1"

# Which services an option of `quire serve` is passed to.
_RECEIVERS: Final[Mapping[str, tuple[str, ...]]] = {
    "store": ("memsvc",),
    "model": ("execsvc",),
    "served_model_name": ("execsvc",),
    "device": ("execsvc",),
    "dtype": ("execsvc",),
    "block_size": ("execsvc",),
    "kv_cache_bytes": ("execsvc",),
    "kv_cache_tokens": ("execsvc",),
    "kv_cache_dtype": ("execsvc",),
    "quantization": ("execsvc",),
    "gpu_memory_utilization": ("execsvc",),
    "max_model_len": ("execsvc",),
    "generation_config": ("execsvc",),
    "override_generation_config": ("execsvc",),
    "attention_backend": ("execsvc",),
    "num_threads": ("execsvc",),
    "max_num_seqs": ("execsvc", "gateway"),
    "max_num_batched_tokens": ("execsvc", "gateway"),
    "max_queue_size": ("gateway",),
    "max_queue_time": ("gateway",),
    "scheduling_policy": ("gateway",),
    "long_prefill_token_threshold": ("gateway",),
    "enable_prefix_caching": ("gateway",),
    "api_server_count": ("gateway",),
}


@dataclasses.dataclass(frozen=True, slots=True)
class ServeOptions:
    """What a user asked `quire serve` for."""

    model: str
    """"smollm2", a GGUF file or a directory."""
    host: str = LOOPBACK
    """Where the gateway listens; the other two stay on loopback."""
    port: int = GATEWAY_PORT
    """Port of the gateway; 0 for any free one, as for the other two."""
    memsvc_port: int = MEMSVC_PORT
    execsvc_port: int = EXECSVC_PORT
    in_process: bool = False
    """Everything in one process: the gateway holds memsvc and the executor."""
    log_level: str = "info"
    drain_grace: float = 25.0
    """Seconds that running requests get at the end."""
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Further settings by name, passed on to the services that have them."""


@dataclasses.dataclass(frozen=True, slots=True)
class ServiceProcess:
    """One process to run."""

    name: str
    """"memsvc", "execsvc" or "gateway"."""
    address: str
    """Where it listens, for local callers."""
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    drain_grace: float
    """Seconds that it gets between SIGTERM and SIGKILL, not counting a margin."""


def _bindable(host: str, port: int) -> int:
    """Returns the port that binding to (`host`, `port`) gives; raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As the servers do: a connection of a predecessor in TIME_WAIT does not keep the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host.strip("[]"), port))
        chosen: int = probe.getsockname()[1]
        return chosen


def choose_port(host: str, port: int, flag: str) -> int:
    """Returns `port`, or a free one for 0.

    Raises:
        ConfigError: the port is in use, or the address is not this machine's.
    """
    try:
        return _bindable(host, port)
    except OSError as error:
        message = f"cannot listen on {host}:{port}: {(error.strerror or str(error)).lower()}"
        raise ConfigError(message, reason="PORT_IN_USE", field=flag) from error


def _flags(service: str, settings: Mapping[str, str]) -> list[str]:
    """Returns the settings of `service` as flags."""
    flags = []
    for name, value in settings.items():
        if service not in _RECEIVERS[name]:
            continue
        flag = name.replace("_", "-")
        if value in {"true", "false"}:
            flags.append(f"--{flag}" if value == "true" else f"--no-{flag}")
        else:
            flags += [f"--{flag}", value]
    return flags


def _variables(service: str, settings: Mapping[str, str]) -> dict[str, str]:
    """Returns the settings of `service` as environment variables."""
    return {
        f"QUIRE_{service.upper()}_{name.upper()}": value
        for name, value in settings.items()
        if service in _RECEIVERS[name]
    }


def resolve_model(model: str) -> str:
    """Returns the model as services take it: a path made absolute, or a name.

    Raises:
        ConfigError: neither a known name nor something that exists.
    """
    if model == "smollm2":
        return model
    path = Path(model).expanduser()
    if not path.exists():
        message = f"--model: {model!r} is neither a GGUF file, nor a directory, nor the name smollm2"
        raise ConfigError(message, field="model")
    return str(path.resolve())


def plan_processes(options: ServeOptions) -> list[ServiceProcess]:
    """Returns the processes to run, in the order of starting.

    Raises:
        ConfigError: a port is in use, or the model does not exist.
    """
    settings = {**options.settings, "model": resolve_model(options.model)}
    local = options.host if options.host not in {"0.0.0.0", "::", "[::]"} else LOOPBACK  # noqa: S104 - compared only
    gateway_port = choose_port(options.host, options.port, "--port")
    gateway = f"{local}:{gateway_port}"
    common = (
        *("--log-level", options.log_level, "--log-format", "json"),
        *("--parent-pid", str(os.getpid()), "--drain-grace", str(options.drain_grace)),
    )

    def process(name: str, address: str, flags: list[str], environment: Mapping[str, str]) -> ServiceProcess:
        argv = (sys.executable, "-m", name, *flags, *common)
        return ServiceProcess(name, address, argv, {**dict(os.environ), **environment}, options.drain_grace)

    gateway_flags = ["--host", options.host, "--port", str(gateway_port), *_flags("gateway", settings)]
    if options.in_process:
        inner = {**_variables("memsvc", settings), **_variables("execsvc", settings)}
        return [process("gateway", gateway, [*gateway_flags, "--in-process"], inner)]
    memsvc = f"{LOOPBACK}:{choose_port(LOOPBACK, options.memsvc_port, '--memsvc-port')}"
    execsvc = f"{LOOPBACK}:{choose_port(LOOPBACK, options.execsvc_port, '--execsvc-port')}"
    memsvc_flags = ["--host", LOOPBACK, "--port", memsvc.rpartition(":")[2], *_flags("memsvc", settings)]
    execsvc_flags = ["--host", LOOPBACK, "--port", execsvc.rpartition(":")[2], "--memsvc", memsvc]
    return [
        process("memsvc", memsvc, memsvc_flags, {}),
        process("execsvc", execsvc, [*execsvc_flags, *_flags("execsvc", settings)], {}),
        process("gateway", gateway, [*gateway_flags, "--memsvc", memsvc], {}),
    ]
