"""What commands print: answers on stdout, one line and a hint for an error on stderr, JSON for programs."""

from __future__ import annotations

from collections.abc import Iterable
import dataclasses
import enum
import json
import sys
from typing import Any, Final

from google.protobuf import duration_pb2
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table
from rich.text import Text

_UNLIMITED: Final = 10_000


def console() -> Console:
    """Returns the console for answers; text is printed as it is, never taken for markup."""
    return Console(markup=False, highlight=False, emoji=False)


def notices() -> Console:
    """Returns the console for everything that is not the answer."""
    return Console(stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=True)


def print_error(message: str, hint: str = "") -> None:
    """Prints an error: one line, and a hint if there is one."""
    printer = notices()
    printer.print(Text.assemble(("error: ", "bold red"), " ".join(message.split())))
    if hint:
        printer.print(Text.assemble(("hint: ", "bold cyan"), hint))


def print_text(text: str) -> None:
    """Prints a piece of text as it comes, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def print_json(value: object) -> None:
    """Prints one JSON document."""
    sys.stdout.write(json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")


def print_json_line(value: object) -> None:
    """Prints one JSON document on a line of its own, at once."""
    print_text(json.dumps(plain(value), ensure_ascii=False) + "\n")


def make_table(columns: Iterable[tuple[str, bool]], rows: Iterable[Iterable[object]]) -> Table:
    """Returns a table.

    Args:
        columns: (heading, whether it holds numbers).
        rows: the cells.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading, number in columns:
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return table


def print_table(columns: Iterable[tuple[str, bool]], rows: Iterable[Iterable[object]]) -> None:
    """Prints what `make_table` makes; where no terminal limits the width, no cell is ever broken."""
    table = make_table(columns, rows)
    printer = console()
    if not printer.is_terminal:
        printer.width = printer.measure(table, options=printer.options.update(width=_UNLIMITED)).maximum
    printer.print(table)


def plain(value: Any) -> Any:
    """Returns `value` made of what JSON has: messages and dataclasses by field, durations in seconds, bytes in hex."""
    if isinstance(value, duration_pb2.Duration):
        return value.ToNanoseconds() / 1e9
    if isinstance(value, Message):
        return {field.name: _field(value, field) for field in value.DESCRIPTOR.fields if _shown(value, field)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _shown(message: Message, field: Any) -> bool:
    """Whether the field says anything: absent messages and optionals do not."""
    return not field.has_presence or message.HasField(field.name)


def _field(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.enum_type is not None:
        return enum_name(field, value)
    if isinstance(value, str | bytes | int | float | Message):
        return plain(value)
    return [plain(item) for item in value]


def enum_name(field: Any, number: int) -> str:
    """Returns the name of an enum value without the enum's own, in lower case: "ready" for POOL_STATE_READY."""
    assert field.enum_type is not None
    names = field.enum_type.values_by_number
    prefix = names[0].name.removesuffix("UNSPECIFIED")
    return names[number].name.removeprefix(prefix).lower() if number in names else str(number)


def state_name(message: Message) -> str:
    """Returns the `state` of a message in lower case."""
    return enum_name(message.DESCRIPTOR.fields_by_name["state"], getattr(message, "state"))  # noqa: B009 - any message


def format_seconds(duration: duration_pb2.Duration) -> str:
    """Returns a duration for people, for example "1.5 s" or "3 min 20 s"."""
    seconds = duration.ToNanoseconds() / 1e9
    if seconds < 60:  # noqa: PLR2004 - seconds in a minute
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"
