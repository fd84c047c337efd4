"""From a snapshot and the commands after it to the state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from memsvc.core import snapshot
from memsvc.core.codec import Codec
from memsvc.core.commands import COMMANDS
from memsvc.core.log import ROOT, Entry, Segment
from memsvc.core.memory import MemoryCore
from memsvc.core.roots import RecordedRoots
from quire.errors import CorruptionError, QuireError

_ENTRY_FIELDS: Final = 4
_MISSHAPEN: Final = (AssertionError, AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)


def apply(core: MemoryCore, entry: Entry) -> Any:
    """Runs the command of one entry and returns its result, None for one that was refused.

    Raises:
        CorruptionError: it does not come out as it did when it was taken down: the entry does not fit the state.
    """
    name = entry.command
    try:
        if name == ROOT:
            if isinstance(core.roots, RecordedRoots):
                core.roots.note(*entry.args)
            return None
        if name not in COMMANDS:
            raise CorruptionError(f"{name[:64]!r} is not a command")
        result = getattr(core, name)(*entry.args, **entry.kwargs)
    except CorruptionError:
        raise
    except QuireError as error:
        if not entry.refused:
            raise CorruptionError(f"{name} was accepted, and is refused now: {error.message}") from error
        result = None
    except _MISSHAPEN as error:
        raise CorruptionError(f"{name} has arguments that it cannot have: {error}") from error
    else:
        if entry.refused:
            raise CorruptionError(f"{name} was refused, and is accepted now")
    core.take_events()
    return result


def replay(base: MemoryCore, entries: Iterable[Entry]) -> MemoryCore:
    """Returns the state after `entries`, begun with that of `base`, which stays as it is.

    Raises:
        CorruptionError: the entries do not fit.
    """
    core = snapshot.clone(base)
    if isinstance(base.roots, RecordedRoots):
        core.roots = base.roots.copy()
    for entry in entries:
        apply(core, entry)
    return core


def replay_segments(segments: Iterable[Segment]) -> MemoryCore:
    """Returns the state after consecutive segments, from the oldest's beginning through every command."""
    segments = list(segments)
    return replay(segments[0].base, (entry for segment in segments for entry in segment.entries()))


_CODEC: Final[Codec] = snapshot.CODEC


def encode_entry(entry: Entry) -> bytes:
    """Returns an entry as bytes; see `memsvc.core.codec`.

    Raises:
        TypeError: an argument is of a class that `snapshot.VALUES` does not name.
    """
    return _CODEC.encode((entry.command, entry.args, dict(entry.kwargs), entry.refused))


def decode_entry(data: bytes | memoryview) -> Entry:
    """Returns the entry in `data`.

    Raises:
        CorruptionError: these are not the bytes of an entry.
    """
    found = _CODEC.decode(data)
    if not isinstance(found, tuple) or len(found) != _ENTRY_FIELDS:
        raise CorruptionError("an entry has four parts: command, arguments, named arguments, whether it was refused")
    command, args, kwargs, refused = found
    kinds = (type(command), type(args), type(kwargs), type(refused))
    if kinds != (str, tuple, dict, bool) or (command not in COMMANDS and command != ROOT):
        raise CorruptionError("an entry's parts are not of the kinds that they must be")
    return Entry(command, args, kwargs, refused)
