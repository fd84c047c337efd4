"""Checks safetensors files before they are read, and reads them.

The format is an 8-byte little-endian header length, a JSON header, and the data. Every number in the header is checked
against the size of the file here, so that a truncated or damaged file is one clear error.
"""

import dataclasses
import itertools
import json
import math
import os
from pathlib import Path
from typing import Any, Final

from safetensors import safe_open
import torch

from quire.errors import ModelFormatError, UnsupportedError

_LENGTH_BYTES: Final = 8
_MAX_HEADER_BYTES: Final = 100 * 2**20
_FLOATS: Final = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}
_INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"


def read_header(path: Path) -> dict[str, Any]:
    """Returns the checked header of a safetensors file: name to {dtype, shape, data_offsets}.

    Raises:
        ModelFormatError: truncated or damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
            raise ModelFormatError(
                f"{path}: truncated or not safetensors: a header of {length} bytes in a file of {size}; "
                "download it again"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise ModelFormatError(f"{path}: not safetensors: the header is not JSON") from error
    if not isinstance(header, dict):
        raise ModelFormatError(f"{path}: not safetensors: the header is not an object")
    header.pop("__metadata__", None)
    _check_extents(path, header, size - _LENGTH_BYTES - length)
    return header


def _check_extents(path: Path, header: dict[str, Any], data_size: int) -> None:
    """Checks that each tensor is where it says, as long as it says, and overlaps no other."""
    extents = []
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers = [*shape, begin, end]
        except (KeyError, TypeError, ValueError) as error:
            raise ModelFormatError(f"{path}: tensor {name!r}: the header's entry is damaged") from error
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ModelFormatError(f"{path}: tensor {name!r}: the header's entry is damaged: {entry}")
        if end > data_size or begin > end:
            raise ModelFormatError(
                f"{path}: the file is truncated: tensor {name!r} ends at byte {end} of the data, "
                f"which has {data_size}; download it again"
            )
        if dtype in _FLOATS and math.prod(shape) * _FLOATS[dtype] != end - begin:
            raise ModelFormatError(f"{path}: tensor {name!r}: {end - begin} bytes do not hold {dtype} {shape}")
        extents.append((begin, end, name))
    extents.sort()
    for (_, end, first), (begin, _, second) in itertools.pairwise(extents):
        if begin < end:
            raise ModelFormatError(f"{path}: tensors {first!r} and {second!r} overlap; the file is damaged")


@dataclasses.dataclass(frozen=True, slots=True)
class SafetensorsFiles:
    """The weights of a model directory: which file holds which tensor."""

    directory: Path
    files: dict[str, Path]
    """Tensor name to file."""

    def load(self, name: str) -> torch.Tensor:
        """Returns a tensor in memory of its own, in the type it is stored in.

        Raises:
            ModelFormatError: no such tensor.
        """
        if name not in self.files:
            raise ModelFormatError(f"{self.directory}: tensor {name!r} is missing")
        with safe_open(self.files[name], framework="pt", device="cpu") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def open_directory(directory: Path) -> SafetensorsFiles:
    """Returns the checked weights of a directory, one file or sharded with an index.

    Raises:
        ModelFormatError: no weights, a shard is missing, truncated or damaged.
        UnsupportedError: a tensor of a type that is no float.
    """
    index = directory / _INDEX
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelFormatError(f"{index}: not an index of safetensors files") from error
    elif (directory / _SINGLE).exists():
        weight_map, shards = None, [_SINGLE]
    else:
        raise ModelFormatError(_explain_missing_weights(directory))
    files: dict[str, Path] = {}
    for shard in shards:
        path = directory / shard
        if os.path.basename(shard) != shard or not path.is_file():  # noqa: PTH119 - a name from a file, not a path yet
            raise ModelFormatError(f"{directory}: the index names {shard!r}, which is not there; download it again")
        for name, entry in read_header(path).items():
            if entry["dtype"] not in _FLOATS:
                raise UnsupportedError(f"{path}: tensor {name!r} has type {entry['dtype']}; floats are supported")
            files[name] = path
    missing = [] if weight_map is None else [name for name in weight_map if name not in files]
    if missing:
        raise ModelFormatError(f"{directory}: the index names tensor {missing[0]!r}, which no shard has")
    return SafetensorsFiles(directory, files)


def _explain_missing_weights(directory: Path) -> str:
    """Returns why a directory without safetensors is refused."""
    pickles = sorted(
        path.name for path in directory.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
    )
    if pickles:
        return (
            f"{directory}: {pickles[0]} is a pickle, which can run any code when it is read; "
            "convert the model to safetensors"
        )
    return f"{directory}: no weights: neither {_SINGLE} nor {_INDEX} is there"
