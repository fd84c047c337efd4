"""The command log in files: a flight recorder, for reports of what a service did.

A file is one segment of the log:

    "QUIRELOG", version as u32
    frames: length of the payload as u32, CRC-32 of kind and payload as u32, kind as one byte, payload

    kind 1, once, first: place of the first entry as u64, then the snapshot, compressed by zlib
    kind 2: one entry
    kind 3: digest of the state after the entries before it; written when the segment ended in good order

Numbers are little-endian, snapshots and entries are in the format of `memsvc.core.codec`. A file that breaks off in the
middle of a frame lost what was being written when its service died; all before it counts.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import os
from pathlib import Path
import struct
from typing import BinaryIO, Final
import zlib

from memsvc.core import snapshot
from memsvc.core.log import Entry, Segment
from memsvc.core.memory import MemoryCore
from memsvc.core.replay import apply, decode_entry, encode_entry
from quire.errors import ConfigError, CorruptionError

MAGIC: Final = b"QUIRELOG"
VERSION: Final = 1
SUFFIX: Final = ".quirelog"

_HEAD: Final = struct.Struct("<8sI")
_FRAME: Final = struct.Struct("<IIB")
_PLACE: Final = struct.Struct("<Q")
_SNAPSHOT, _ENTRY, _DIGEST = 1, 2, 3
_COMPRESSION: Final = 1
_SNAPSHOT_BYTES_MAXIMUM: Final = 1 << 32


class LogFile:
    """A file that is being written.

    Args:
        path: a file that does not exist yet.
        segment: what it is of.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, segment: Segment) -> None:
        self.segment = segment
        self.path = path
        self.written = 0
        # Prompts are in it: nobody but the service's own user may read it.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._file = os.fdopen(descriptor, "wb")
        self._file.write(_HEAD.pack(MAGIC, VERSION))
        data = zlib.compress(snapshot.encode(segment.base), _COMPRESSION)
        self._put(_SNAPSHOT, _PLACE.pack(segment.first) + data)

    def write(self, stop: int) -> None:
        """Writes the entries of the segment before `stop`, and hands them to the system."""
        for entry in self.segment.entries(self.written, stop):
            self._put(_ENTRY, encode_entry(entry))
        self.written = stop
        self._file.flush()

    def finish(self, state: MemoryCore) -> None:
        """Ends the file with the digest of the state after all entries."""
        self._put(_DIGEST, snapshot.digest(state))
        self.close()

    def close(self) -> None:
        """Ends the file."""
        self._file.close()

    def _put(self, kind: int, payload: bytes) -> None:
        self._file.write(_frame(kind, payload))


def _frame(kind: int, payload: bytes) -> bytes:
    check = zlib.crc32(payload, zlib.crc32(bytes((kind,))))
    return _FRAME.pack(len(payload), check, kind) + payload


@dataclasses.dataclass(slots=True)
class Replayed:
    """A file that was replayed.

    Attributes:
        core: the state.
        first: place of the file's first entry among all of its service.
        count: entries that were replayed.
        last: the last of them.
        is_torn: whether the file breaks off in the middle of a frame.
        is_checked: whether the state was compared with the service's own digest, and is equal.
    """

    core: MemoryCore
    first: int
    count: int = 0
    last: Entry | None = None
    is_torn: bool = False
    is_checked: bool = False


def replay_file(path: Path, until: int | None = None) -> Replayed:
    """Replays a file, or its first `until` entries.

    Raises:
        ConfigError: it cannot be read, or is no command log.
        CorruptionError: it is damaged, or does not give the state that its service had.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD.size)
            if len(head) < _HEAD.size or _HEAD.unpack(head)[0] != MAGIC:
                raise ConfigError(f"{path}: is not a command log of Quire", field="file")
            if _HEAD.unpack(head)[1] != VERSION:
                raise ConfigError(f"{path}: is of version {_HEAD.unpack(head)[1]}, known is {VERSION}", field="file")
            return _replay(_Frames(file, path), path, until)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", field="file") from error


class _Frames:
    """Reads frames; a file that breaks off ends quietly."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self.is_torn = False

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        size = os.fstat(self._file.fileno()).st_size
        while head := self._file.read(_FRAME.size):
            at = self._file.tell()
            if len(head) < _FRAME.size:
                self.is_torn = True
                return
            length, check, kind = _FRAME.unpack(head)
            if length > size - at:
                self.is_torn = True
                return
            payload = self._file.read(length)
            if zlib.crc32(payload, zlib.crc32(bytes((kind,)))) != check:
                if at + length == size:
                    self.is_torn = True
                    return
                raise CorruptionError(f"{self._path}: the frame at byte {at} is damaged", metadata={"offset": at})
            yield kind, payload


def _replay(frames: _Frames, path: Path, until: int | None) -> Replayed:
    replayed: Replayed | None = None
    for kind, payload in frames:
        if replayed is None:
            if kind != _SNAPSHOT:
                raise CorruptionError(f"{path}: does not begin with a snapshot")
            replayed = Replayed(snapshot.decode(_expand(payload[_PLACE.size :], path)), *_PLACE.unpack_from(payload))
        elif kind == _ENTRY:
            if until is not None and replayed.count >= until:
                return replayed
            replayed.last = decode_entry(payload)
            apply(replayed.core, replayed.last)
            replayed.count += 1
        elif kind == _DIGEST:
            if snapshot.digest(replayed.core) != payload:
                raise CorruptionError(f"{path}: its {replayed.count} entries give another state than the service had")
            replayed.is_checked = True
        else:
            raise CorruptionError(f"{path}: no frame is of kind {kind}")
    if replayed is None:
        raise CorruptionError(f"{path}: breaks off before the end of its snapshot")
    replayed.is_torn = frames.is_torn
    return replayed


def _expand(data: bytes, path: Path) -> bytes:
    """Returns the bytes of a snapshot; bounded, whatever the file says."""
    expander = zlib.decompressobj()
    try:
        found = expander.decompress(data, _SNAPSHOT_BYTES_MAXIMUM)
    except zlib.error as error:
        raise CorruptionError(f"{path}: the snapshot is damaged: {error}") from error
    if not expander.eof:
        raise CorruptionError(f"{path}: the snapshot is cut, or larger than {_SNAPSHOT_BYTES_MAXIMUM} bytes")
    return found
