"""Packed columns: little-endian u32 in `bytes`, as the internal protocols carry them."""

from array import array
from collections.abc import Iterable, Sequence
import sys
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from quire.errors import InvalidRequestError

U32 = np.dtype("<u4")
F32 = np.dtype("<f4")
U32_BYTES = 4

Column: TypeAlias = npt.NDArray[np.uint32]


def pack(values: Sequence[int] | Iterable[int] | Column) -> bytes:
    """Returns `values` (each 0 .. 2^32 - 1) as a u32 column."""
    if isinstance(values, np.ndarray):
        return values.astype(U32, copy=False).tobytes()
    # Twice as fast as numpy at this, and it copies another array of u32 as it is.
    packed = array("I", values)
    if sys.byteorder != "little":
        packed.byteswap()
    return packed.tobytes()


def check(data: bytes, field: str, *, row_length: int = 1, row_count: int | None = None) -> None:
    """Raises InvalidRequestError unless `data` is as many u32 as it should be; the arguments are those of `unpack`."""
    row_bytes = U32_BYTES * row_length
    if len(data) % row_bytes:
        message = f"{field}: {len(data)} bytes is not a multiple of {row_bytes} (rows of {row_length} u32)"
        raise InvalidRequestError(message, field=field)
    if row_count is not None and len(data) != row_count * row_bytes:
        message = f"{field}: {len(data) // row_bytes} rows, expected {row_count} as in the columns beside it"
        raise InvalidRequestError(message, field=field)


def unpack(data: bytes, field: str, *, row_length: int = 1, row_count: int | None = None) -> Column:
    """Returns the u32 column `data` without a copy.

    Args:
        data: packed little-endian u32.
        field: name for the error message.
        row_length: the number of values must be a multiple of this.
        row_count: the number of rows must be exactly this, if given.

    Raises:
        InvalidRequestError: the length does not fit.
    """
    check(data, field, row_length=row_length, row_count=row_count)
    return np.frombuffer(data, dtype=U32)


def unpack_list(data: bytes, field: str, *, row_length: int = 1, row_count: int | None = None) -> list[int]:
    """Returns the u32 column `data` as a list of ints; raises as `unpack`."""
    values: list[int] = unpack(data, field, row_length=row_length, row_count=row_count).tolist()
    return values


def pack_floats(values: Sequence[float]) -> bytes:
    """Returns `values` as an f32 column: packed little-endian, as long as a u32 column of as many rows."""
    return np.array(values, dtype=F32).tobytes()


def unpack_floats(data: bytes, field: str, *, row_count: int | None = None) -> list[float]:
    """Returns an f32 column as a list; raises as `unpack`."""
    check(data, field, row_count=row_count)
    values: list[float] = np.frombuffer(data, dtype=F32).tolist()
    return values
