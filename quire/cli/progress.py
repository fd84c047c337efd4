"""Shows how far the services are: bars on a terminal, lines elsewhere."""

from __future__ import annotations

from typing import Final, Self

from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

from quire.cli.output import notices
from quire.serve.child import event_of
from quire.serve.readiness import Progress

_SHARE_STEP: Final = 0.25
_UNINTERESTING: Final = ("event", "level", "timestamp", "service")


def describe_line(service: str, line: str) -> str:
    """Returns a line of a log for people: the event and its fields, or the line as it is."""
    event = event_of(line)
    if event is None:
        return f"{service}: {line}"
    fields = " ".join(f"{name}={value}" for name, value in event.items() if name not in _UNINTERESTING)
    return f"{service}: {event.get('level', '')} {event.get('event', '')} {fields}".rstrip()


class TerminalReporter:
    """Shows progress and warnings on stderr; with `verbose` every line that a service logs."""

    def __init__(self, *, verbose: bool) -> None:
        """Prepares the terminal; enter it as a context for as long as the services start."""
        self._verbose = verbose
        self._console = notices()
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description:<8}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[phase]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, tuple[str, int]] = {}

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def finish(self) -> None:
        """Takes the bars away."""
        self._bars.stop()

    def progress(self, service: str, progress: Progress) -> None:
        """Shows how far a service is."""
        if not self._console.is_terminal:
            self._say(service, progress)
            return
        if service not in self._tasks:
            self._tasks[service] = self._bars.add_task(service, total=None, phase="")
        task = self._tasks[service]
        share = 1.0 if progress.ready else progress.share
        self._bars.update(task, total=None if share is None else 1.0, completed=share or 0.0, phase=progress.phase)
        if progress.ready:
            self._bars.stop_task(task)

    def _say(self, service: str, progress: Progress) -> None:
        """Prints a line when the phase changes, and at every quarter of it."""
        quarter = int((progress.share or 0.0) / _SHARE_STEP)
        if self._said.get(service) != (progress.phase, quarter):
            self._said[service] = (progress.phase, quarter)
            share = "" if progress.share is None else f" {progress.share:.0%}"
            self._console.print(f"{service}: {progress.phase}{share}")

    def log_line(self, service: str, line: str, *, loud: bool) -> None:
        """Prints a warning, or with `verbose` anything."""
        if loud or self._verbose:
            self._console.print(Text(describe_line(service, line), "yellow" if loud else "dim"))

    def note(self, text: str) -> None:
        """Prints a remark."""
        self._console.print(Text(text, "yellow"))
