"""Reads GGUF files: metadata, and tensors dequantised to float32.

The header is parsed and checked against the size of the file before any tensor is touched, so a truncated or damaged
file is one clear error. Dequantisation is the `gguf` package's.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
from pathlib import Path
import struct
from typing import Any, Final, Self

import gguf
import numpy as np
import torch

from execsvc.model.few_bits import UNPACK
from kernels.cpu.panels import Quantised
from quire.errors import ModelFormatError, UnsupportedError

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_DEFAULT_ALIGNMENT: Final = 32
_MAX_DIMENSIONS: Final = 4
_MATRIX_AXES: Final = 2
_STRING, _ARRAY = 8, 9
_SCALARS: Final = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies in the file."""

    name: str
    shape: tuple[int, ...]
    """Outermost axis first, as torch has it."""
    kind: gguf.GGMLQuantizationType
    offset: int
    """Byte of the file where it begins."""
    byte_count: int


class _Cursor:
    """Reads little-endian values one after the other and never past the end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._path = path
        self.position = 0

    def take(self, count: int, what: str) -> bytes:
        """Returns the next `count` bytes.

        Raises:
            ModelFormatError: the file ends before.
        """
        end = self.position + count
        if count < 0 or end > len(self._data):
            raise ModelFormatError(
                f"{self._path}: the file is truncated: {what} at byte {self.position} needs {count} bytes, "
                f"{len(self._data) - self.position} are left; download it again"
            )
        taken = self._data[self.position : end]
        self.position = end
        return taken

    def integer(self, kind: int, what: str) -> int:
        """Returns the next scalar of `kind`."""
        scalar = _SCALARS[kind]
        return int(scalar.unpack(self.take(scalar.size, what))[0])

    def string(self, what: str) -> str:
        """Returns the next length-prefixed string."""
        try:
            return self.take(self.integer(10, what), what).decode()
        except UnicodeDecodeError as error:
            raise ModelFormatError(f"{self._path}: {what} at byte {self.position} is not UTF-8") from error

    def value(self, kind: int, what: str) -> Any:
        """Returns the next value of `kind`; an array is a list."""
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            item_kind, count = self.integer(4, what), self.integer(10, what)
            if item_kind == _STRING:
                return [self.string(what) for _ in range(count)]
            scalar = self._scalar(item_kind, what)
            data = self.take(scalar.size * count, what)
            return [row[0] for row in scalar.iter_unpack(data)]
        scalar = self._scalar(kind, what)
        return scalar.unpack(self.take(scalar.size, what))[0]

    def _scalar(self, kind: int, what: str) -> struct.Struct:
        if kind not in _SCALARS:
            raise ModelFormatError(f"{self._path}: {what} has the unknown type {kind}; the file is damaged")
        return _SCALARS[kind]


class GGUFFile:
    """An open GGUF file. Use as a context manager, or `close` it.

    Raises:
        ModelFormatError: not GGUF, truncated, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < len(_MAGIC) or file.read(len(_MAGIC)) != _MAGIC:
                raise ModelFormatError(f"{path}: not a GGUF file: it does not begin with the bytes 'GGUF'")
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            self._read_header()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmaps the file."""
        self._data.close()

    def _read_header(self) -> None:
        cursor = _Cursor(self._data, self.path)
        cursor.take(len(_MAGIC), "magic")
        version = cursor.integer(4, "version")
        if version not in _VERSIONS:
            raise ModelFormatError(f"{self.path}: GGUF version {version} is not supported; supported are {_VERSIONS}")
        tensor_count, value_count = cursor.integer(10, "tensor count"), cursor.integer(10, "metadata count")
        for _ in range(value_count):
            key = cursor.string("metadata key")
            self.metadata[key] = cursor.value(cursor.integer(4, key), key)
        raw = [self._read_tensor_info(cursor) for _ in range(tensor_count)]
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ModelFormatError(f"{self.path}: general.alignment is {alignment!r}")
        start = -(-cursor.position // alignment) * alignment
        for info in raw:
            self._add_tensor(dataclasses.replace(info, offset=start + info.offset))

    def _read_tensor_info(self, cursor: _Cursor) -> TensorInfo:
        name = cursor.string("tensor name")
        dimension_count = cursor.integer(4, name)
        if not 1 <= dimension_count <= _MAX_DIMENSIONS:
            raise ModelFormatError(f"{self.path}: tensor {name!r} has {dimension_count} axes; the file is damaged")
        shape = tuple(reversed([cursor.integer(10, name) for _ in range(dimension_count)]))
        raw_kind = cursor.integer(4, name)
        try:
            kind = gguf.GGMLQuantizationType(raw_kind)
        except ValueError as error:
            raise UnsupportedError(f"{self.path}: tensor {name!r} has the unknown type {raw_kind}") from error
        block_size, type_size = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block_size:
            raise ModelFormatError(
                f"{self.path}: tensor {name!r}: rows of {shape[-1]} are not whole blocks of {block_size} ({kind.name})"
            )
        elements = 1
        for size in shape:
            elements *= size
        return TensorInfo(name, shape, kind, cursor.integer(10, name), elements // block_size * type_size)

    def _add_tensor(self, info: TensorInfo) -> None:
        if info.name in self.tensors:
            raise ModelFormatError(f"{self.path}: tensor {info.name!r} is there twice")
        if info.offset + info.byte_count > len(self._data):
            raise ModelFormatError(
                f"{self.path}: the file is truncated: tensor {info.name!r} ends at byte "
                f"{info.offset + info.byte_count}, the file at {len(self._data)}; download it again"
            )
        self.tensors[info.name] = info

    def load(self, name: str) -> torch.Tensor:
        """Returns a tensor, dequantised to float32, in memory of its own.

        Raises:
            ModelFormatError: no such tensor.
            UnsupportedError: a quantisation that the `gguf` package cannot undo.
        """
        if name not in self.tensors:
            raise ModelFormatError(f"{self.path}: tensor {name!r} is missing")
        info = self.tensors[name]
        data = np.frombuffer(self._data, dtype=np.uint8, count=info.byte_count, offset=info.offset)
        try:
            if info.kind == gguf.GGMLQuantizationType.F32:
                values = data.view(np.float32).copy()
            elif info.kind == gguf.GGMLQuantizationType.F16:
                values = data.view(np.float16).astype(np.float32)
            else:
                block_size, type_size = gguf.GGML_QUANT_SIZES[info.kind]
                rows = data.reshape(*info.shape[:-1], info.shape[-1] // block_size * type_size)
                values = gguf.quants.dequantize(rows, info.kind)
        except NotImplementedError as error:
            raise UnsupportedError(f"{self.path}: tensor {name!r}: quantisation {info.kind.name}") from error
        finally:
            del data
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).reshape(info.shape)

    def load_quantised(self, name: str) -> Quantised | None:
        """Returns a matrix in the bits that the file has it in, or None if it has it in another kind than 4 or 8.

        Kinds of llama.cpp: Q8_0, Q4_0 and Q4_1 have blocks of 32 weights; Q4_K and Q6_K blocks of 256 with a scale, in
        few bits, for each 32 or 16 of them (`execsvc.model.few_bits`).

        Raises:
            ModelFormatError: no such tensor.
        """
        if name not in self.tensors:
            raise ModelFormatError(f"{self.path}: tensor {name!r} is missing")
        info = self.tensors[name]
        unpack = UNPACK.get(info.kind)
        if unpack is None or len(info.shape) != _MATRIX_AXES:
            return None
        _, block_bytes = gguf.GGML_QUANT_SIZES[info.kind]
        data = np.frombuffer(self._data, dtype=np.uint8, count=info.byte_count, offset=info.offset)
        blocks = torch.from_numpy(data.reshape(info.shape[0], -1, block_bytes).copy())
        del data
        return unpack(blocks)
