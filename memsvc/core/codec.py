"""Values of the core <-> bytes: a small self-describing format, read without running anything that it names.

A value is a tag byte and its body; `n` is an unsigned LEB128 number.

    N T F        None, true, false
    i  n bytes   integer, two's complement little-endian in n bytes
    d  8 bytes   IEEE 754 double, little-endian
    s  n bytes   text, UTF-8
    b  n bytes   bytes
    l t S q  n values   list, tuple, set in ascending order, deque (its maximum length comes first, as a value)
    m x  n pairs dict, or a read-only one, in its order: key, value
    a  code n dimensions, data    numpy array; code is an index into `_TYPES`, data is little-endian
    c  code n bytes     array.array or memoryview of this format character
    y  n bytes   bytearray
    e  name, integer    member of an enumeration
    o  name n pairs     object: (name of the field, value) for each field of its class
    p  n         the n-th object that began before: the same one again

Names are texts without a tag. Integer columns that fit are written in fewer bytes and come back as they were.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
import dataclasses
import enum
import functools
import operator
import struct
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np

from quire.errors import CorruptionError

_TYPES = tuple(np.dtype(name) for name in ("<i8", "<i4", "<u4", "<u2", "u1", "i1", "<u8", "<f8", "<f4", "?", "<i2"))
_CODES = {kind: code for code, kind in enumerate(_TYPES)}
_NARROW = tuple(np.dtype(name) for name in ("u1", "<u2", "<u4"))
_INT64 = np.dtype("<i8")
_WIDE = 0x80
_DEPTH_LIMIT = 24
_DIMENSION_LIMIT = 4
_VIEW_FORMATS = frozenset("bBhHiIqQlLfd?")
_ONE = {None: b"N", True: b"T", False: b"F"}


@dataclasses.dataclass(slots=True)
class Node:
    """An object with a state of its own, as it was read: its class and its fields."""

    cls: type
    fields: dict[str, Any]


@functools.cache
def fields_of(cls: type) -> tuple[str, ...]:
    """Returns the names of the fields of a dataclass or a class with slots; nothing for others, see `state_of`."""
    if dataclasses.is_dataclass(cls):
        return tuple(field.name for field in dataclasses.fields(cls))
    return tuple(name for base in cls.__mro__ for name in base.__dict__.get("__slots__", ()))


@functools.cache
def _getter(names: tuple[str, ...]) -> Callable[[object], tuple[Any, ...]]:
    """Returns a function that reads several fields at once."""
    if len(names) == 1:
        return lambda found: (getattr(found, names[0]),)
    return operator.attrgetter(*names) if names else lambda _: ()


@functools.cache
def _kept(cls: type, derived: frozenset[str]) -> tuple[str, ...]:
    return tuple(name for name in fields_of(cls) if name not in derived)


def state_of(found: object, derived: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Returns the fields of an object by name, those left out that are `derived` from others."""
    if isinstance(found, Node):
        return found.fields
    cls: type = type(found)
    names = _kept(cls, derived) or tuple(name for name in vars(found) if name not in derived)
    return dict(zip(names, _getter(names)(found), strict=True))


def values_of(found: object) -> tuple[Any, ...]:
    """Returns the values of all fields of a dataclass's object, in their order."""
    if isinstance(found, Node):
        return tuple(found.fields[name] for name in fields_of(found.cls))
    cls: type = type(found)
    return _readers[cls](found) if cls in _readers else _readers.setdefault(cls, _getter(fields_of(cls)))(found)


_readers: dict[type, Callable[[object], tuple[Any, ...]]] = {}


class Codec:
    """Writes and reads values.

    Args:
        values: classes of immutable objects, enumerations among them.
        states: classes of objects with a state of their own, and their fields that are derived from others.
    """

    def __init__(self, values: Collection[type], states: Mapping[type, frozenset[str]]) -> None:
        self.values = frozenset(values)
        self.states = dict(states)
        self._by_name = {cls.__name__: cls for cls in (*values, *states)}

    def encode(self, value: object) -> bytes:
        """Returns a value as bytes.

        Raises:
            TypeError: it holds something of a class that was not named.
        """
        chunks: list[Any] = []
        self._write(value, chunks.append, {})
        return b"".join(chunks)

    def decode(self, data: bytes | memoryview) -> Any:
        """Returns the value in `data`. Objects with a state are returned as `Node`s.

        Raises:
            CorruptionError: these are not the bytes of one value.
        """
        return _Reader(data, self._by_name, self.states).whole()

    def _write(self, value: Any, put: Callable[[Any], None], seen: dict[int, int]) -> None:
        kind = type(value)
        if value is None or kind is bool:
            put(_ONE[value])
        elif kind is int:
            data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
            put(b"i" + _number(len(data)) + data)
        elif kind is float:
            put(b"d" + struct.pack("<d", value))
        elif kind is str:
            put(b"s" + _text(value))
        elif kind is bytes:
            put(b"b" + _number(len(value)))
            put(value)
        elif kind is np.ndarray:
            _write_array(value, put)
        elif kind is dict or kind is MappingProxyType:
            put((b"m" if kind is dict else b"x") + _number(len(value)))
            for key, item in value.items():
                self._write(key, put, seen)
                self._write(item, put, seen)
        elif kind in _MANY:
            put(_MANY[kind] + _number(len(value)))
            if kind is deque:
                self._write(value.maxlen, put, seen)
            for item in sorted(value) if kind is set else value:
                self._write(item, put, seen)
        elif kind is bytearray:
            put(b"y" + _number(len(value)))
            put(bytes(value))
        elif kind is array or kind is memoryview:
            data = value.tobytes()
            code = value.typecode if kind is array else value.format
            put(b"c" + code.encode() + _number(len(data)))
            put(data)
        elif kind in self.values and issubclass(kind, enum.IntEnum):
            put(b"e" + _text(kind.__name__))
            self._write(int(value), put, seen)
        else:
            self._write_object(value, put, seen)

    def _write_object(self, value: Any, put: Callable[[Any], None], seen: dict[int, int]) -> None:
        kind = type(value)
        if kind in self.states:
            if id(value) in seen:
                put(b"p" + _number(seen[id(value)]))
                return
            seen[id(value)] = len(seen)
        elif kind not in self.values:
            raise TypeError(f"{kind.__qualname__} is not a class that can be written")
        fields = state_of(value, self.states.get(kind, frozenset()))
        put(b"o" + _text(kind.__name__) + _number(len(fields)))
        for name, item in fields.items():
            put(_text(name))
            self._write(item, put, seen)


_MANY: dict[type, bytes] = {list: b"l", tuple: b"t", set: b"S", deque: b"q"}


def _number(value: int) -> bytes:
    """Returns an unsigned LEB128 number."""
    out = bytearray()
    while value > 0x7F:  # noqa: PLR2004 - seven bits a byte
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _text(value: str) -> bytes:
    data = value.encode()
    return _number(len(data)) + data


def _write_array(value: np.ndarray[Any, Any], put: Callable[[Any], None]) -> None:
    kind = value.dtype.newbyteorder("<")
    stored, code = value, _CODES.get(kind)
    if code is None:
        raise TypeError(f"an array of {value.dtype} cannot be written")
    if kind == _INT64 and value.size:
        low, high = int(value.min()), int(value.max())
        narrow = next((small for small in _NARROW if low >= 0 and high <= np.iinfo(small).max), None)
        if narrow is not None:
            stored, code = value.astype(narrow), _CODES[narrow] | _WIDE
    put(b"a" + bytes((code,)) + _number(value.ndim) + b"".join(_number(size) for size in value.shape))
    put(np.ascontiguousarray(stored, stored.dtype.newbyteorder("<")).tobytes())


def _damaged(at: int, what: str) -> NoReturn:
    raise CorruptionError(f"at byte {at}: {what}", metadata={"offset": at})


class _Reader:
    """Reads one value out of bytes that nobody vouches for."""

    def __init__(
        self, data: bytes | memoryview, classes: Mapping[str, type], states: Mapping[type, frozenset[str]]
    ) -> None:
        self._data = memoryview(data)
        self._at = 0
        self._classes = classes
        self._states = states
        self._nodes: list[Node] = []

    def whole(self) -> Any:
        """Returns the value, which is all there is."""
        value = self._value(_DEPTH_LIMIT)
        if self._at != len(self._data):
            _damaged(self._at, f"{len(self._data) - self._at} bytes are left over")
        return value

    def _take(self, count: int) -> memoryview:
        if count > len(self._data) - self._at:
            _damaged(self._at, f"{count} bytes are expected, {len(self._data) - self._at} are left")
        self._at += count
        return self._data[self._at - count : self._at]

    def _number(self) -> int:
        value = 0
        for shift in range(0, 63, 7):
            byte = self._take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:  # noqa: PLR2004 - the last byte
                return value
        _damaged(self._at, "a number of more than nine bytes")

    def _text(self) -> str:
        start = self._at
        try:
            return str(self._take(self._number()), "utf-8")
        except UnicodeDecodeError:
            _damaged(start, "a text is not UTF-8")

    def _items(self, depth: int) -> Iterator[Any]:
        count = self._number()
        if count > len(self._data) - self._at:
            _damaged(self._at, f"{count} values are expected, {len(self._data) - self._at} bytes are left")
        for _ in range(count):
            yield self._value(depth)

    def _value(self, depth: int) -> Any:
        start, tag = self._at, bytes(self._take(1))
        if not depth:
            _damaged(start, f"values are nested more than {_DEPTH_LIMIT} deep")
        match tag:
            case b"N" | b"T" | b"F":
                return {b"N": None, b"T": True, b"F": False}[tag]
            case b"i":
                return int.from_bytes(self._take(self._number()), "little", signed=True)
            case b"d":
                return struct.unpack("<d", self._take(8))[0]
            case b"s":
                return self._text()
            case b"b":
                return bytes(self._take(self._number()))
            case b"y":
                return bytearray(self._take(self._number()))
            case b"a":
                return self._array()
            case b"c":
                return self._column()
            case b"e":
                return self._member(start, depth)
            case b"o":
                return self._object(start, depth)
            case b"p":
                return self._again()
        return self._collection(tag, start, depth - 1)

    def _collection(self, tag: bytes, start: int, depth: int) -> Any:
        try:
            match tag:
                case b"l":
                    return list(self._items(depth))
                case b"t":
                    return tuple(self._items(depth))
                case b"S":
                    return set(self._items(depth))
                case b"q":
                    count = self._number()
                    limit = self._value(depth)
                    return deque((self._value(depth) for _ in range(count)), limit)
                case b"m" | b"x":
                    pairs = {self._value(depth): self._value(depth) for _ in range(self._number())}
                    return pairs if tag == b"m" else MappingProxyType(pairs)
        except (TypeError, ValueError, OverflowError):
            _damaged(start, "a key that cannot be one, or a length that is none")
        _damaged(start, f"no value begins with {tag!r}")

    def _array(self) -> np.ndarray[Any, Any]:
        start, code = self._at, self._take(1)[0]
        if code & ~_WIDE >= len(_TYPES):
            _damaged(start, f"no array has the type {code}")
        kind, dimensions = _TYPES[code & ~_WIDE], self._number()
        if dimensions > _DIMENSION_LIMIT:
            _damaged(start, f"an array of {dimensions} dimensions")
        shape = tuple(self._number() for _ in range(dimensions))
        count = 1
        for size in shape:
            count *= size
        values = np.frombuffer(self._take(count * kind.itemsize), kind)
        # A copy, in memory that is aligned and outlives the bytes it was read from.
        return values.astype(np.int64 if code & _WIDE else kind.newbyteorder("=")).reshape(shape)

    def _column(self) -> array[Any]:
        start, code = self._at, chr(self._take(1)[0])
        data = self._take(self._number())
        if code not in _VIEW_FORMATS or code == "?":
            _damaged(start, f"no column has the format {code!r}")
        column: array[Any] = array(code)
        if len(data) % column.itemsize:
            _damaged(start, f"{len(data)} bytes are not whole items of {column.itemsize}")
        column.frombytes(data)
        return column

    def _class(self, start: int) -> type:
        name = self._text()
        cls = self._classes.get(name)
        if cls is None:
            _damaged(start, f"no class is called {name[:64]!r}")
        return cls

    def _member(self, start: int, depth: int) -> Any:
        cls, number = self._class(start), self._value(depth - 1)
        try:
            return cls(number) if issubclass(cls, enum.IntEnum) else _damaged(start, f"{cls.__name__} has no members")
        except ValueError:
            _damaged(start, f"{cls.__name__} has no member {number!r:.64}")

    def _object(self, start: int, depth: int) -> Any:
        cls = self._class(start)
        node = Node(cls, {})
        if cls in self._states:
            self._nodes.append(node)
        for _ in range(self._number()):
            name = self._text()
            node.fields[name] = self._value(depth - 1)
        known = _kept(cls, self._states.get(cls, frozenset()))
        if known and set(known) != node.fields.keys():
            _damaged(start, f"the fields of {cls.__name__} are not those that this version knows")
        if cls in self._states:
            return node
        try:
            return cls(**node.fields)
        except TypeError:
            _damaged(start, f"{cls.__name__} cannot be made of its fields")

    def _again(self) -> Node:
        start, number = self._at, self._number()
        if number >= len(self._nodes):
            _damaged(start, f"no object number {number} began before")
        return self._nodes[number]
