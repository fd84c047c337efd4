"""`quire top`: a pool and its sequences, as they change."""

from __future__ import annotations

import time
from typing import Annotated, Final

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
import typer

from protos.memsvc.v1 import admin_pb2
from quire.cli import options
from quire.cli.admin import AdminClient
from quire.cli.drawing import SEQUENCE_COLUMNS, draw_pool, sequence_row
from quire.cli.output import console, make_table, print_json_line
from quire.errors import InvalidRequestError

_LINES_OF_POOL: Final = 7
_NANOSECONDS: Final = 1_000_000_000


class WatchedPool:
    """What a stream of WatchPool has told so far."""

    def __init__(self) -> None:
        """Knows nothing yet."""
        self.pool = admin_pb2.Pool()
        self._seen: dict[int, tuple[admin_pb2.SequenceSummary, float]] = {}
        self._tokens: dict[int, int] = {}
        self._told_at = 0.0
        self.token_rate = 0.0
        """Tokens that sequences gained in a second between the last two moments, without their prompts."""

    def apply(self, response: admin_pb2.WatchPoolResponse, now: float) -> bool:
        """Takes a message in, at `now` seconds; returns whether its moment is complete."""
        for ordinal in response.gone_ordinals:
            self._seen.pop(ordinal, None)
        for sequence in response.sequences:
            self._seen[sequence.ordinal] = (sequence, now)
        if not response.HasField("pool"):
            return False
        self.pool.CopyFrom(response.pool)
        tokens = {ordinal: sequence.token_count for ordinal, (sequence, _) in self._seen.items()}
        gained = sum(count - self._tokens[ordinal] for ordinal, count in tokens.items() if ordinal in self._tokens)
        self.token_rate = gained / (now - self._told_at) if self._told_at and now > self._told_at else 0.0
        self._tokens, self._told_at = tokens, now
        return True

    def sequences(self, now: float) -> list[admin_pb2.SequenceSummary]:
        """Returns the sequences, the oldest first, with their ages at `now`."""
        found = []
        for _, (told, at) in sorted(self._seen.items()):
            sequence = admin_pb2.SequenceSummary()
            sequence.CopyFrom(told)
            sequence.age.FromNanoseconds(told.age.ToNanoseconds() + int((now - at) * _NANOSECONDS))
            found.append(sequence)
        return found


def _draw(watched: WatchedPool, width: int, height: int, now: float) -> Group:
    """Returns the pool, and as many of its sequences as `height` lines have room for."""
    sequences = watched.sequences(now)
    room = max(1, height - _LINES_OF_POOL - 2)
    parts: list[Text | Table] = [draw_pool(watched.pool, width), Text(f"{watched.token_rate:.0f} tokens/s\n")]
    if sequences:
        parts.append(make_table(SEQUENCE_COLUMNS, map(sequence_row, sequences[:room])))
    if len(sequences) > room:
        parts.append(Text(f"and {len(sequences) - room} more", "dim"))
    return Group(*parts)


def _only_pool(admin: AdminClient) -> str:
    """Returns the only pool that there is; raises InvalidRequestError."""
    names = [pool.pool_id for pool in admin.pools()]
    if len(names) == 1:
        return names[0]
    found = f"there are {', '.join(names)}: name one" if names else "no executor has registered one yet"
    raise InvalidRequestError(f"pool: {found}", field="pool")


def top(
    *,
    pool: Annotated[str, typer.Argument(metavar="POOL", help="Id of the pool; the only one if not given.")] = "",
    memsvc: options.Memsvc = options.MEMSVC_ADDRESS,
    interval: Annotated[float, typer.Option(min=0.1, max=60, help="Least seconds between two pictures.")] = 1.0,
    count: Annotated[int, typer.Option(min=0, help="End after so many pictures; 0: at Ctrl-C.")] = 0,
    json: options.Json = False,
) -> None:
    """Show a pool and the sequences in it as they change, until Ctrl-C.

    Only what has changed is sent, and nothing while nothing changes. With --json every change is a line.

    For example:

        quire top

        quire top executor-0 --interval 0.2 --json | jq .pool.free_block_count
    """
    watched, shown = WatchedPool(), 0
    with AdminClient(memsvc) as admin, Live(console=console(), auto_refresh=False) as live:
        for response in admin.watch(pool or _only_pool(admin), interval):
            complete = watched.apply(response, time.monotonic())
            if json:
                print_json_line(response)
            elif complete:
                _show(watched, live)
            shown += complete
            if shown == count > 0:
                return


def _show(watched: WatchedPool, live: Live) -> None:
    """Prints the pool: over the last picture on a terminal, below it elsewhere."""
    printer = live.console
    picture = _draw(watched, printer.width, printer.height, time.monotonic())
    if printer.is_terminal:
        live.update(picture, refresh=True)
    else:
        printer.print(picture, soft_wrap=True)
