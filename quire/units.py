"""Arithmetic on counts and bytes."""

import re

from quire.errors import ConfigError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def div_ceil(numerator: int, denominator: int) -> int:
    """Returns numerator / denominator, rounded up."""
    return -(-numerator // denominator)


def round_up(value: int, multiple: int) -> int:
    """Returns the least multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def parse_bytes(text: str) -> int:
    """Returns the number of bytes in "4Gi", "512MiB", "2GB" or "1048576".

    Raises:
        ConfigError: the text is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", text.strip().lower())
    if match is None:
        message = f"not a size in bytes: {text!r}; write for example 1073741824, 512MiB or 4GiB"
        raise ConfigError(message)
    return int(float(match[1]) * _UNITS[match[2] or ""])


def parse_size(text: str) -> int | float:
    """Returns the number of bytes of a size, or the share below 1 of a percentage such as "25%".

    Raises:
        ConfigError: the text is neither, or the percentage is not above 0 and below 100.
    """
    if not text.strip().endswith("%"):
        return parse_bytes(text)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip())
    share = float(match[1]) / 100 if match else 0.0
    if not 0 < share < 1:
        message = f"not a share: {text!r}; a percentage is above 0 and below 100, for example 25%"
        raise ConfigError(message)
    return share


def format_bytes(count: int) -> str:
    """Returns `count` bytes for people, for example "1.5 GiB"."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:  # noqa: PLR2004 - the step between binary units
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
