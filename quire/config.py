"""Settings of a service: flags over `QUIRE_<SERVICE>_<FIELD>` over defaults, into a frozen dataclass.

    @dataclasses.dataclass(frozen=True, slots=True)
    class MemsvcConfig(ServiceConfig):
        store: str = setting("memory://", "Where shared metadata lives.")

    config = load(MemsvcConfig, "memsvc", sys.argv[1:], os.environ)

Unknown flags and unknown variables with the service's prefix are errors, as are values out of range. `describe` shows
each value and where it came from.
"""

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import types
import typing
from typing import Any, TypeVar

from quire.errors import ConfigError

_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


def setting(
    default: Any,
    description: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[str] | None = None,
) -> Any:
    """Returns a dataclass field that is a setting: its default, one sentence (with unit), and what is allowed."""
    metadata = {"description": description, "minimum": minimum, "maximum": maximum, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, slots=True)
class ServiceConfig:
    """What every service has."""

    host: str = setting("127.0.0.1", "Address to listen on. Anything but loopback is open to the network.")
    port: int = setting(0, "Port to listen on; 0 lets the system choose.", minimum=0, maximum=65535)
    log_level: str = setting("info", "Least level that is logged.", choices=("debug", "info", "warning", "error"))
    log_format: str = setting("auto", "auto is console on a terminal, else json.", choices=("auto", "json", "console"))
    parent_pid: int = setting(0, "Drain and exit when this process is gone; 0 for never.", minimum=0)
    drain_grace: float = setting(25.0, "Seconds that running calls get to finish after SIGTERM.", minimum=0)


Config = TypeVar("Config", bound=ServiceConfig)


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """One field of a configuration class, ready to be parsed."""

    name: str
    kind: type
    optional: bool
    default: Any
    metadata: Mapping[str, Any]

    def parse(self, text: str, origin: str) -> Any:
        """Returns the value in `text`; raises ConfigError naming `origin`, the value and what is allowed."""
        try:
            return self._convert(text)
        except ValueError:
            message = f"{origin}: {text!r} is not {self._kind_name()}"
            raise ConfigError(message, field=self.name) from None

    def _convert(self, text: str) -> Any:
        if self.optional and text.lower() in {"", "none"}:
            return None
        if self.kind is bool:
            if text.lower() not in _TRUE | _FALSE:
                raise ValueError
            return text.lower() in _TRUE
        return self.kind(text)

    def _kind_name(self) -> str:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        return names[self.kind]

    def check(self, value: Any, origin: str) -> None:
        """Raises ConfigError if `value` is out of range."""
        if value is None:
            return
        low, high, choices = self.metadata["minimum"], self.metadata["maximum"], self.metadata["choices"]
        if choices is not None and value not in choices:
            message = f"{origin}: {value!r} is not one of {', '.join(choices)}"
        elif (low is not None and not value >= low) or (high is not None and not value <= high):
            allowed = f"at least {low}" if high is None else f"at most {high}" if low is None else f"{low} .. {high}"
            message = f"{origin}: {value} is out of range, allowed is {allowed}"
        else:
            return
        raise ConfigError(message, field=self.name)


def settings_of(cls: type[ServiceConfig]) -> list[Setting]:
    """Returns the settings of a configuration class, in order."""
    hints = typing.get_type_hints(cls)
    found = []
    for field in dataclasses.fields(cls):
        hint, optional = hints[field.name], False
        if isinstance(hint, types.UnionType):
            (hint,), optional = [part for part in typing.get_args(hint) if part is not type(None)], True
        found.append(Setting(field.name, hint, optional, field.default, field.metadata))
    return found


def _parser(cls: type[ServiceConfig], service: str, epilog: str) -> argparse.ArgumentParser:
    """Returns the command line of a service. Values stay text: `load` parses flags and variables alike."""
    parser = argparse.ArgumentParser(
        prog=f"quire {service}",
        description=(cls.__doc__ or "").strip(),
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for item in settings_of(cls):
        flag = "--" + item.name.replace("_", "-")
        default = "none" if item.default is None else item.default
        text = f"{item.metadata['description']} [default: {default}]".replace("%", "%%")
        if item.kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            parser.add_argument(
                flag, default=None, help=text, choices=item.metadata["choices"], metavar=item.name.upper()
            )
    return parser


def load(
    cls: type[Config], service: str, argv: Sequence[str], environ: Mapping[str, str], *, epilog: str = ""
) -> tuple[Config, dict[str, str]]:
    """Returns the configuration of a service and where each value came from ("flag", "environment" or "default").

    Raises:
        ConfigError: an unknown variable, a value that cannot be parsed, or one out of range.
        SystemExit: 2 on an unknown flag, 0 after `--help`, as argparse does.
    """
    prefix = f"QUIRE_{service.upper()}_"
    known = {item.name: item for item in settings_of(cls)}
    for variable in environ:
        if variable.startswith(prefix) and variable.removeprefix(prefix).lower() not in known:
            allowed = ", ".join(sorted(prefix + name.upper() for name in known))
            message = f"{variable}: no such setting; known are {allowed}"
            raise ConfigError(message, field=variable)
    flags = vars(_parser(cls, service, epilog).parse_args(argv))
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, item in known.items():
        variable, origin = prefix + name.upper(), "--" + name.replace("_", "-")
        if flags[name] is not None:
            values[name] = flags[name] if item.kind is bool else item.parse(flags[name], origin)
            sources[name] = "flag"
        elif variable in environ:
            origin = variable
            values[name], sources[name] = item.parse(environ[variable], origin), "environment"
        else:
            values[name], sources[name] = item.default, "default"
        item.check(values[name], origin)
    return cls(**values), sources


def describe(config: ServiceConfig, sources: Mapping[str, str]) -> dict[str, str]:
    """Returns each setting as "value (source)" for the `config_loaded` event. Passwords in URLs are hidden."""
    return {
        field.name: f"{_without_password(getattr(config, field.name))} ({sources[field.name]})"
        for field in dataclasses.fields(config)
    }


def _without_password(value: object) -> object:
    """Returns `value`, with the password of a URL replaced."""
    if not isinstance(value, str) or "://" not in value or "@" not in value:
        return value
    scheme, _, rest = value.partition("://")
    credentials, _, host = rest.rpartition("@")
    user = credentials.partition(":")[0]
    return f"{scheme}://{user}:***@{host}"
