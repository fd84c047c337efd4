"""What tenants may hold and keep of every pool, from a file.

    [tenants.team-a]
    floor_blocks = 100
    ceiling_blocks = 2000
    retained_blocks = 200
    pinned_blocks = 50

All four are optional, those of `quire.memsvc.v1.Quota`. What a pool is too small for is cut to it.
"""

from __future__ import annotations

from pathlib import Path
import tomllib
from typing import Any, Final, NoReturn

from memsvc.core.tenancy import TenantQuota
from memsvc.core.validation import TEXT_LENGTH_MAXIMUM
from quire.errors import ConfigError

_LARGEST: Final = 2**31 - 1
_LEAST: Final = {"floor_blocks": 0, "ceiling_blocks": 1, "retained_blocks": 0, "pinned_blocks": 0}


def read_quotas(path: str) -> dict[str, TenantQuota]:
    """Returns the quotas in a file, by tenant.

    Raises:
        ConfigError: the file cannot be read, or says something that cannot be.
    """
    try:
        content = tomllib.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        _refuse(f"{path}: {error}")
    tenants = content.pop("tenants", {})
    if content or not isinstance(tenants, dict):
        _refuse(f"{path}: found {', '.join(content) or 'tenants'}, expected tables [tenants.NAME] only")
    return {name: _quota(f"{path}: tenants.{name}", name, fields) for name, fields in tenants.items()}


def _quota(where: str, name: str, fields: Any) -> TenantQuota:
    """Returns one tenant's quota."""
    if not isinstance(fields, dict) or len(name) > TEXT_LENGTH_MAXIMUM:
        _refuse(f"{where}: expected a table, with a name of at most {TEXT_LENGTH_MAXIMUM} characters")
    for key, value in fields.items():
        if key not in _LEAST:
            _refuse(f"{where}.{key}: is unknown, known are {', '.join(_LEAST)}")
        if type(value) is not int or not _LEAST[key] <= value <= _LARGEST:
            _refuse(f"{where}.{key}: found {value!r}, allowed are {_LEAST[key]} .. {_LARGEST}")
    quota = TenantQuota(
        floor=fields.get("floor_blocks", 0),
        ceiling=fields.get("ceiling_blocks"),
        retained=fields.get("retained_blocks"),
        pinned=fields.get("pinned_blocks", 0),
    )
    if quota.ceiling is not None and quota.kept > quota.ceiling:
        _refuse(f"{where}.ceiling_blocks: found {quota.ceiling}, less than the floor or the pins, {quota.kept}")
    return quota


def _refuse(message: str) -> NoReturn:
    raise ConfigError(f"--quota-file: {message}", field="quota_file")
