"""What happened to a block or to a sequence: the log is replayed, and what is watched is compared at every command.

Nothing is kept for it while commands run: history costs only who asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import dataclasses
from typing import Any, Final, Protocol

from memsvc.core import snapshot
from memsvc.core.commands import COMMANDS
from memsvc.core.log import ROOT, Entry, Segment
from memsvc.core.memory import MemoryCore
from memsvc.core.replay import apply
from memsvc.core.validation import PoolRegistration
from quire.memory import AdmitRequest

BEGINNING: Final = "beginning"
"""Command of the record that tells how things were when the log begins."""


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """What one command did to what is watched.

    Attributes:
        before: how it was; None where it was not there.
        after: how it is; None where it is not there any more.
        sequence_id: the sequence concerned, if one is.
        explanation: what happened, in a sentence.
    """

    before: Any
    after: Any
    sequence_id: str
    explanation: str


@dataclasses.dataclass(frozen=True, slots=True)
class HistoryRecord:
    """One command that concerned what is watched.

    Attributes:
        place: place of the command among all since the log began.
        at: when, in seconds of the caller's clock; commands without a time have that of the one before.
        command: its name.
        pool_id: the pool that it named, or that is watched.
        gateway_id: who asked for it, or whom it is about; empty if nobody.
        refused: whether it was refused.
        change: what it did; None if nothing is watched.
    """

    place: int
    at: float
    command: str
    pool_id: str
    gateway_id: str
    refused: bool
    change: Change | None


class Watch(Protocol):
    """Something that is watched through a replay."""

    def begin(self, core: MemoryCore) -> list[Change]:
        """Notes how things are, and returns what is there already."""
        ...

    def compare(self, core: MemoryCore, command: str) -> list[Change]:
        """Returns what has changed since the last call."""
        ...


class Everything:
    """Watches nothing: every command is a record."""

    def begin(self, core: MemoryCore) -> list[Change]:
        """Returns nothing."""
        del core
        return []

    def compare(self, core: MemoryCore, command: str) -> list[Change]:
        """Returns one empty change for each command."""
        del core, command
        return [Change(None, None, "", "")]


def history(
    segments: Sequence[Segment], watch: Watch, breathe: Callable[[], None] = lambda: None
) -> Iterator[HistoryRecord]:
    """Yields what happened, the oldest first.

    Args:
        segments: consecutive parts of a log; commands that come meanwhile are left out.
        watch: what to look at.
        breathe: called between commands, so that others may run meanwhile.

    Raises:
        CorruptionError: the log does not fit itself.
    """
    if not segments:
        return
    lengths = [len(segment.lines) for segment in segments]
    core = snapshot.clone(segments[0].base)
    core.roots = segments[0].base.roots
    at, last = None, BEGINNING
    held = [(segments[0].first, change) for change in watch.begin(core)]
    for segment, length in zip(segments, lengths, strict=True):
        for place, entry in enumerate(segment.entries(stop=length), segment.first):
            if entry.command == ROOT:
                apply(core, entry)
                continue
            time, pool_id, gateway_id = _about(core, entry)
            at = time if time is not None else at
            for first, change in held:
                yield HistoryRecord(first, at or 0.0, last, "", "", refused=False, change=change)
            held = []
            apply(core, entry)
            for change in watch.compare(core, entry.command):
                yield HistoryRecord(place, at or 0.0, entry.command, pool_id, gateway_id, entry.refused, change)
            breathe()
    for first, change in held:
        yield HistoryRecord(first, at or 0.0, last, "", "", refused=False, change=change)


def begins_at(segments: Sequence[Segment]) -> float | None:
    """Returns the time of the first command that has one, None if there is none."""
    for segment in segments:
        for entry in segment.entries(stop=len(segment.lines)):
            spec = COMMANDS.get(entry.command)
            at: float | None = spec.argument("now", entry.args, entry.kwargs) if spec is not None else None
            if at is not None:
                return at
    return None


def _about(core: MemoryCore, entry: Entry) -> tuple[float | None, str, str]:
    """Returns when an entry's command ran, which pool it names, and which gateway; before it runs."""
    spec = COMMANDS[entry.command]
    time: float | None = spec.argument("now", entry.args, entry.kwargs)
    number = spec.argument("number", entry.args, entry.kwargs)
    gateway_id = spec.argument("gateway_id", entry.args, entry.kwargs) or ""
    if isinstance(number, int):
        gateway_id = next((known.gateway_id for known in core.gateways if known.number == number), f"number {number}")
    pool_id = spec.argument("pool_id", entry.args, entry.kwargs) or spec.argument(
        "executor_id", entry.args, entry.kwargs
    )
    for value in (*entry.args, *entry.kwargs.values()):
        if isinstance(value, AdmitRequest):
            pool_id = value.pool_id
        elif isinstance(value, PoolRegistration):
            pool_id = value.executor_id
    return time, pool_id or "", gateway_id
