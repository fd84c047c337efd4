"""How a model's makers would have tokens chosen: what holds where a request does not say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Final, Protocol

from execsvc.sampler import MAX_TEMPERATURE
from quire.errors import ConfigError, ModelFormatError, QuireError

AUTO: Final = "auto"
NEUTRAL: Final = "vllm"
FILE_NAME: Final = "generation_config.json"

_GGUF_KEYS: Final = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
_MAX_PENALTY, _MAX_COUNT = 100.0, 2**31 - 1


class GenerationSource(Protocol):
    """A model that may bring a configuration of generation."""

    path: Path

    def generation(self) -> Mapping[str, Any]:
        """Returns what it brings, by the names of generation_config.json."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Sampling parameters of requests that do not give them; None: as if there were no default."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None

    def named(self) -> dict[str, float | int]:
        """Returns those that are set, by name."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclasses.dataclass(frozen=True, slots=True)
class _Rule:
    """What one parameter may be."""

    allowed: str
    inside: Callable[[float], bool]
    whole: bool = False


_RULES: Final = {
    "temperature": _Rule(f"0 .. {MAX_TEMPERATURE:g}", lambda value: 0 <= value <= MAX_TEMPERATURE),
    "top_k": _Rule("a whole number, 0 (all) or more", lambda value: 0 <= value <= _MAX_COUNT, whole=True),
    "top_p": _Rule("greater than 0, at most 1", lambda value: 0 < value <= 1),
    "min_p": _Rule("0 .. 1", lambda value: 0 <= value <= 1),
    "repetition_penalty": _Rule(f"greater than 0, at most {_MAX_PENALTY:g}", lambda value: 0 < value <= _MAX_PENALTY),
    "max_new_tokens": _Rule("a whole number, 1 or more", lambda value: 1 <= value <= _MAX_COUNT, whole=True),
}


def from_gguf(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the metadata of a GGUF file says, by the names of generation_config.json."""
    return {name: metadata[key] for key, name in _GGUF_KEYS.items() if key in metadata}


def sampling_defaults(source: GenerationSource, chosen: str, override: str | None) -> SamplingDefaults:
    """Returns the sampling parameters of requests that do not give them.

    As in vLLM, `do_sample` is not looked at: temperature alone says whether tokens are drawn.

    Args:
        source: the model.
        chosen: "auto" for what the model brings, "vllm" for nothing, or a directory with a generation_config.json.
        override: a JSON object that goes before it, parameter by parameter; None for nothing.

    Raises:
        ModelFormatError: the model's own values cannot be used.
        ConfigError: those of `chosen` or `override` cannot.
    """
    values: dict[str, Any] = {}
    if chosen == AUTO:
        values = _checked(source.generation(), _refuse_model(source.path))
    elif chosen != NEUTRAL:
        path = Path(chosen).expanduser() / FILE_NAME
        if not path.is_file():
            raise ConfigError(
                f"generation_config: no file {path}; give {AUTO!r}, {NEUTRAL!r} or a directory with a {FILE_NAME}",
                field="generation_config",
            )
        values = _checked(_parse(path.read_text(encoding="utf-8"), "generation_config"), _refuse("generation_config"))
    if override is not None:
        field = "override_generation_config"
        given = _parse(override, field)
        unknown = sorted(given.keys() - _RULES.keys())
        if unknown:
            raise ConfigError(f"{field}: found {unknown[0]!r}, allowed are {', '.join(_RULES)}", field=field)
        values |= _checked(given, _refuse(field))
    values["max_tokens"] = values.pop("max_new_tokens", None)
    return SamplingDefaults(**values)


def _parse(text: str, field: str) -> dict[str, Any]:
    """Returns a JSON object; raises ConfigError."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{field}: not JSON: {error}", field=field) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{field}: found {text[:64]!r}, a JSON object is needed", field=field)
    return values


def _refuse(field: str) -> Callable[[str], QuireError]:
    """Returns what makes errors of a setting."""
    return lambda message: ConfigError(f"{field}: {message}", field=field)


def _refuse_model(path: Path) -> Callable[[str], QuireError]:
    """Returns what makes errors of the model itself."""
    return lambda message: ModelFormatError(
        f"{path}: {message}; --generation-config {NEUTRAL} goes without", field="generation_config"
    )


def _checked(values: Mapping[str, Any], refuse: Callable[[str], QuireError]) -> dict[str, Any]:
    """Returns the parameters that are known and set; raises what `refuse` makes."""
    found: dict[str, Any] = {}
    for name, rule in _RULES.items():
        value = values.get(name)
        if value is None:
            continue
        if name == "top_k" and value == -1:
            value = 0
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not rule.inside(value) or (rule.whole and value != int(value)):
            raise refuse(f"{name}: found {value!r}, allowed is {rule.allowed}")
        found[name] = int(value) if rule.whole else float(value)
    return found
