"""How kernels are launched on which device: tables that are read once, instead of measuring at run time.

A table is a JSON file named after a device, and holds a list of entries for each kernel, the first fitting of which
counts:

    {"rms_norm": [{"when": {"size": {"at_most": 1024}}, "use": {"elements": 2048, "num_warps": 2}},
                  {"when": {}, "use": {"elements": 4096, "num_warps": 8}}]}

`when` names properties of the launch: a value, or a bound. What a device's table does not say is looked up in
`default.json`, which fits every launch. `quire tune` measures and writes the table of the device at hand.
"""

from collections.abc import Iterator, Mapping
import contextlib
import functools
import json
from pathlib import Path
import re
from types import MappingProxyType
from typing import Any

import torch

FOLDER = Path(__file__).parent
DEFAULT = "default"

Property = int | str

_overrides: dict[str, Mapping[str, int]] = {}


def table_name(device_name: str) -> str:
    """Returns the name of a device's table: lower case, anything but letters and digits as single hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def _is_entry(entry: object) -> bool:
    """Tells whether `entry` says when it counts and what to use then."""
    if not (isinstance(entry, dict) and set(entry) == {"when", "use"}):
        return False
    when, use = entry["when"], entry["use"]
    if not (isinstance(when, dict) and isinstance(use, dict)):
        return False
    bounds = [condition for condition in when.values() if isinstance(condition, dict)]
    return all(isinstance(value, int) for value in use.values()) and all(
        set(bound) <= {"at_least", "at_most"} for bound in bounds
    )


def check_table(table: object, source: str) -> dict[str, list[dict[str, Any]]]:
    """Returns `table` if it is one.

    Args:
        table: what a file held.
        source: named in messages.

    Raises:
        ValueError: it is not of the form above.
    """
    if not isinstance(table, dict):
        message = f"{source}: an object of kernels expected, found {type(table).__name__}"
        raise ValueError(message)  # noqa: TRY004 - what a file holds is a value
    for kernel, entries in table.items():
        if not (isinstance(entries, list) and all(_is_entry(entry) for entry in entries)):
            message = f'{source}: {kernel}: a list of {{"when": {{...}}, "use": {{option: integer}}}} expected'
            raise ValueError(message)
    return table


@functools.cache
def _table(name: str) -> dict[str, list[dict[str, Any]]]:
    """Returns a table; an empty one for a device that has none."""
    path = FOLDER / f"{name}.json"
    if not path.exists():
        return {}
    return check_table(json.loads(path.read_text()), path.name)


@functools.cache
def device_table_name(device: torch.device) -> str:
    """Returns the name of the table for `device`."""
    if device.type != "cuda":
        return DEFAULT
    return table_name(torch.cuda.get_device_name(device))


def _fits(condition: Any, value: Property | None) -> bool:
    if isinstance(condition, dict):
        if not isinstance(value, int):
            return False
        least, most = condition.get("at_least", value), condition.get("at_most", value)
        return bool(least <= value <= most)
    return bool(condition == value)


@functools.cache
def _lookup(kernel: str, name: str, properties: tuple[tuple[str, Property], ...]) -> Mapping[str, int]:
    known = dict(properties)
    for table in (_table(name), _table(DEFAULT)):
        for entry in table.get(kernel, []):
            if all(_fits(condition, known.get(key)) for key, condition in entry["when"].items()):
                return MappingProxyType(entry["use"])
    message = f"kernels/configs/{DEFAULT}.json: no entry of {kernel!r} fits {known}"
    raise LookupError(message)


def lookup(kernel: str, device: torch.device, **properties: Property) -> Mapping[str, int]:
    """Returns how `kernel` is launched on `device`.

    Args:
        kernel: name in the tables.
        device: where it will run; anything but CUDA (the interpreter) has the defaults.
        properties: of the launch, such as `head_dim=128` or `dtype="bfloat16"`.

    Raises:
        LookupError: the default table has no entry that fits, which is a mistake in it.
    """
    if kernel in _overrides:
        return _overrides[kernel]
    return _lookup(kernel, device_table_name(device), tuple(properties.items()))


@contextlib.contextmanager
def override(kernel: str, use: Mapping[str, int]) -> Iterator[None]:
    """Within, `kernel` is launched with these options: how options are compared. Not for several threads."""
    _overrides[kernel] = use
    try:
        yield
    finally:
        del _overrides[kernel]


def forget() -> None:
    """Drops what was read, after a table has been rewritten."""
    for cached in (_table, _lookup, device_table_name):
        cached.cache_clear()
