"""Packed columns: what is put in comes out, and what does not fit is refused."""

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from quire.columns import pack, unpack, unpack_list
from quire.errors import InvalidRequestError


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_a_column_keeps_its_values(values: list[int]) -> None:
    """Every block id and token of the internal protocols goes through here."""
    assert unpack_list(pack(values), "values") == values
    assert pack(np.array(values, dtype=np.uint32)) == pack(values)


def test_a_column_is_little_endian_on_every_machine() -> None:
    """Processes on different machines exchange them."""
    assert pack([1, 256]) == b"\x01\0\0\0\0\x01\0\0"


def test_a_column_is_read_without_a_copy() -> None:
    """A copy of every prompt would cost more than the rest of the admission."""
    data = pack(range(1000))
    assert unpack(data, "values").base is not None


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_a_torn_value_is_refused(length: int) -> None:
    """A message cut in the middle must not be read as other numbers."""
    with pytest.raises(InvalidRequestError, match=r"token_ids: .* not a multiple of 4") as caught:
        unpack(b"\0" * length, "token_ids")
    assert caught.value.field == "token_ids"


def test_rows_must_be_whole_and_as_many_as_beside() -> None:
    """Columns that belong together and differ in length would shift every value after."""
    with pytest.raises(InvalidRequestError, match="rows of 3"):
        unpack(pack([1, 2, 3, 4]), "appended", row_length=3)
    with pytest.raises(InvalidRequestError, match="2 rows, expected 3"):
        unpack(pack([1, 2]), "tables", row_count=3)


@pytest.mark.parametrize("value", [-1, 2**32])
def test_a_value_that_does_not_fit_is_never_wrapped(value: int) -> None:
    """A token id that wraps around is another token."""
    with pytest.raises(OverflowError):
        pack([value])
