"""Arithmetic on counts and bytes."""

from hypothesis import given
from hypothesis import strategies as st
import pytest

from quire.errors import ConfigError
from quire.units import div_ceil, format_bytes, parse_bytes, parse_size, round_up


@given(st.integers(0, 10**18), st.integers(1, 10**9))
def test_rounding_up_is_exact_for_any_size(value: int, step: int) -> None:
    """One block too few loses a token's keys and values; floats round wrong from 2^53 on."""
    assert (div_ceil(value, step) - 1) * step < value <= div_ceil(value, step) * step or value == 0
    assert round_up(value, step) % step == 0
    assert 0 <= round_up(value, step) - value < step


@pytest.mark.parametrize(
    ("text", "count"),
    [("1048576", 2**20), ("512MiB", 2**29), ("2GB", 2 * 10**9), ("4Gi", 2**32), ("1.5 kib", 1536), ("7b", 7), ("0", 0)],
)
def test_sizes_are_read_as_people_write_them(text: str, count: int) -> None:
    """A cache of 4G instead of 4Gi is 7 % smaller than asked for."""
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "lots", "-1", "4 XiB", "1e9", "GiB", "1.2.3G"])
def test_what_is_no_size_is_refused(text: str) -> None:
    """A size that is guessed takes all memory or none."""
    with pytest.raises(ConfigError, match="not a size"):
        parse_bytes(text)


def test_a_size_may_be_a_share() -> None:
    """One setting serves machines of any size."""
    assert parse_size("25%") == 0.25
    assert parse_size(" 12.5 % ") == 0.125
    assert parse_size("2MiB") == 2**21


@pytest.mark.parametrize("text", ["0%", "100%", "-5%", "%", "a%", "1e1%"])
def test_what_is_no_share_is_refused(text: str) -> None:
    """All of the memory would leave none for anything else."""
    with pytest.raises(ConfigError, match="above 0 and below 100"):
        parse_size(text)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**31, "2.0 GiB"), (2**42, "4.0 TiB")]
)
def test_sizes_are_shown_in_binary_units(count: int, text: str) -> None:
    """The budget table is read by people."""
    assert format_bytes(count) == text
