"""The command log: every accepted command of a core, so that its state at any time since can be had again.

    state = snapshot + the commands after it

The log is a few segments, each a copy of the state as it began and the commands since, kept as they came: taking one
down costs one list entry. When a segment is full a new one begins, and the oldest is dropped. What a log may take is
bounded in bytes, copies of the state included; a state that is too large for that ends the log rather than the bound.

The order of the entries is the order of the commands. Entries hold arguments, among them prompts: a log is as
confidential as the requests it tells of.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import itertools
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from memsvc.core import snapshot
from memsvc.core.commands import COMMANDS
from memsvc.core.memory import MemoryCore
from quire.memory import PoolSpec

ROOT: Final = "root"
"""Name of the entries that are no commands: (geometry, adapter, tenant, salt, root digest, tag of the tenant)."""

_SEGMENTS: Final = 2
_FOLLOWED: Final = 4
_WEIGH_EVERY: Final = 64
_ENTRY_BYTES: Final = 256
_ENTRY_LIMIT: Final = 1_000_000
# Entries with objects in them are what the garbage collector passes over: more would show as pauses.
_HEAVY_LIMIT: Final = 16_384
_LIGHT: Final = frozenset({int, float, bool})


class Entry(NamedTuple):
    """One command that was accepted, or that was refused and left traces."""

    command: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    refused: bool


Line = tuple[str, tuple[Any, ...], Mapping[str, Any] | None, bool]
"""An entry as it is kept: a plain tuple costs a third of a named one, and without a dict the collector passes it by."""

_NO_KWARGS: Final[Mapping[str, Any]] = MappingProxyType({})


@dataclasses.dataclass(slots=True)
class Segment:
    """A part of the log.

    Attributes:
        first: place of its first entry among all since the log began.
        base: the state before it; never changed.
        lines: the commands, oldest first; only ever appended to.
        readers: who reads it, maybe in another thread: its memory is not used anew before they are done.
    """

    first: int
    base: MemoryCore
    lines: list[Line] = dataclasses.field(default_factory=list)
    readers: set[object] = dataclasses.field(default_factory=set)

    def entries(self, start: int = 0, stop: int | None = None) -> Iterator[Entry]:
        """Yields the entries [start, stop) of this segment; without `stop` those included that come meanwhile."""
        for line in itertools.islice(self.lines, start, stop):
            command, args, kwargs, refused = line
            yield Entry(command, args, kwargs or _NO_KWARGS, refused)


class Follower:
    """Gets every segment of a log in turn, also those that the log has dropped meanwhile, within bounds.

    Attributes:
        segments: oldest first; the last is the one that is being added to.
        missed: how many segments were dropped here too, because too many waited.
    """

    __slots__ = ("missed", "segments")

    def __init__(self) -> None:
        self.segments: deque[Segment] = deque()
        self.missed = 0

    def take(self, segment: Segment) -> None:
        """Takes in a segment that has begun."""
        segment.readers.add(self)
        self.segments.append(segment)
        if len(self.segments) > _FOLLOWED:
            self.missed += 1
            self.done()

    def done(self) -> None:
        """Lets the oldest segment go."""
        self.segments.popleft().readers.discard(self)


class CommandLog:
    """The log of one core; it begins with the state as it is now.

    Args:
        core: whose commands are taken down.
        limit_bytes: about how many bytes entries and copies of the state may take.

    Attributes:
        segments: oldest first.
        ended: why the log has ended; empty while it goes on.
    """

    def __init__(self, core: MemoryCore, limit_bytes: int) -> None:
        self._core = core
        self._limit_bytes = limit_bytes
        self.segments: list[Segment] = []
        self.ended = ""
        self._followers: list[Follower] = []
        self._room = 0
        self._weighed = 0
        self._heavy = 0
        self._due = _WEIGH_EVERY
        self._lines: list[Line] = []
        if self.rotate():
            core.log = self
            core.roots = self

    def append(self, command: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, refused: bool) -> None:
        """Takes down a command; see `memsvc.core.commands.Recorder`."""
        lines = self._lines
        lines.append((command, args, kwargs or None, refused))
        if len(lines) >= self._due:
            self._weigh()

    def find(self, spec: PoolSpec, adapter: str, tenant: str, cache_salt: str) -> None:
        """Knows no root: the core derives them; see `memsvc.core.memory.Roots`."""

    def derived(self, spec: PoolSpec, adapter: str, tenant: str, cache_salt: str, root: bytes, tenant_tag: int) -> None:
        """Takes down a root, so that a replay does not need the tenants' secret."""
        self._lines.append((ROOT, (spec, adapter, tenant, cache_salt, root, tenant_tag), None, False))

    @property
    def first(self) -> int:
        """Place of the oldest entry that is kept, among all since the log began."""
        return self.segments[0].first if self.segments else 0

    @property
    def end(self) -> int:
        """How many entries there were since the log began."""
        return self.segments[-1].first + len(self._lines) if self.segments else 0

    def read(self) -> tuple[object, list[Segment]]:
        """Returns the segments, which stay as they are until `done` is called with the first of both."""
        reader = object()
        for segment in self.segments:
            segment.readers.add(reader)
        return reader, list(self.segments)

    @staticmethod
    def done(reader: object, segments: Iterable[Segment]) -> None:
        """Ends a `read`; may be called in another thread."""
        for segment in segments:
            segment.readers.discard(reader)

    def follow(self) -> Follower:
        """Returns a follower that begins with the newest segment."""
        follower = Follower()
        self._followers.append(follower)
        for segment in self.segments[-1:]:
            follower.take(segment)
        return follower

    def rotate(self) -> bool:
        """Begins a new segment and drops the oldest if there are too many; false if the log has ended instead.

        It ends when the state is too large for it, or cannot be copied: a defect here must not become one of commands.
        """
        size = snapshot.weight(self._core)
        self._room = self._limit_bytes // _SEGMENTS - size
        # At least as much room for commands as for the state: else the log would copy more than it takes down.
        if self._room < size:
            return self._end(f"the state takes {size} bytes, which needs a log of {2 * _SEGMENTS * size}")
        first = self.end
        dropped = self.segments[: len(self.segments) + 1 - _SEGMENTS]
        del self.segments[: len(dropped)]
        spare = dropped[0].base if dropped and not dropped[0].readers else None
        try:
            base = snapshot.clone(self._core, spare)
        except (AttributeError, TypeError, ValueError) as error:
            return self._end(f"the state cannot be copied: {error}")
        self.segments.append(Segment(first, base))
        self._lines = self.segments[-1].lines
        for follower in self._followers:
            follower.take(self.segments[-1])
        self._weighed, self._due, self._heavy = 0, _WEIGH_EVERY, 0
        # Each segment is complete: roots that are used in it are taken down in it.
        self._core.forget_roots()
        return True

    def _end(self, why: str) -> bool:
        """Ends the log and forgets it; returns false."""
        self.ended = why
        self.segments.clear()
        self._lines = []
        self._core.log = None
        self._core.roots = None
        return False

    def _weigh(self) -> None:
        """Takes the newest entries off the room that is left, and rotates if there is none."""
        lines = self._lines
        room = self._room - _ENTRY_BYTES * (len(lines) - self._weighed)
        for command, args, kwargs, _ in lines[self._weighed :]:
            if command == ROOT or not COMMANDS[command].is_light:
                self._heavy += 1
                for item in args:
                    if type(item) not in _LIGHT:
                        room -= snapshot.weight(item)
                if kwargs:
                    room -= snapshot.weight(kwargs)
        self._room = room
        self._weighed, self._due = len(lines), len(lines) + _WEIGH_EVERY
        if room <= 0 or len(lines) >= _ENTRY_LIMIT or self._heavy >= _HEAVY_LIMIT:
            self.rotate()
