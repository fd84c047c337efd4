"""`quire history`: what happened to a block or to a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final

import typer

from protos.memsvc.v1 import admin_pb2
from quire.cli import options
from quire.cli.admin import AdminClient
from quire.cli.output import console, format_seconds, notices, print_json, print_table, state_name
from quire.errors import ConfigError

_HEADINGS: Final = (("AGO", True), ("COMMAND", False), ("GATEWAY", False))


def history(
    subject: Annotated[
        str | None, typer.Argument(metavar="SEQUENCE|POOL", help="Sequence or request; with BLOCK, the pool.")
    ] = None,
    block: Annotated[int | None, typer.Argument(min=1, max=2**32 - 1, metavar="BLOCK", help="Block number.")] = None,
    *,
    pool: Annotated[str, typer.Option(metavar="POOL", help="Every command that names this pool.")] = "",
    limit: Annotated[int, typer.Option(min=0, help="Most records; 0 for all.")] = 0,
    memsvc: options.Memsvc = options.MEMSVC_ADDRESS,
    json: options.Json = False,
) -> None:
    """Show what happened to a block or to a sequence, as far back as the memory service remembers.

    For example:

        quire history executor-0 17

        quire history 3f2a

        quire history --pool executor-0 --limit 50
    """
    if pool and subject is not None:
        raise ConfigError("--pool: not together with a sequence or a block", field="pool")
    with AdminClient(memsvc) as admin:
        if block is not None:
            found = admin.history(pool_id=subject or "", block_id=block, limit=limit)
        else:
            found = admin.history(pool_id=pool, sequence_id=subject or "", limit=limit)
    if json:
        print_json(found)
        return
    if block is not None:
        _print_block(found)
    elif subject is not None:
        _print_sequence(found)
    else:
        print_table(
            [*_HEADINGS, ("POOL", False), ("", False)],
            [(*_who(record), record.pool_id, "refused" if record.refused else "") for record in found.records],
        )
    notices().print(
        f"the log goes {format_seconds(found.log_age)} back" if found.HasField("log_age") else "no command yet"
    )


def _who(record: admin_pb2.HistoryRecord) -> tuple[str, str, str]:
    return (format_seconds(record.age), record.command, record.gateway_id or "-")


def _print_block(found: admin_pb2.HistoryResponse) -> None:
    """Prints one line a change of a block."""
    rows = []
    for record in found.records:
        before, after = record.block_before, record.block_after
        was = state_name(before) if record.HasField("block_before") else "-"
        became = state_name(after) if record.HasField("block_after") else "-"
        states = was if was == became else f"{was} > {became}"
        rows.append(
            (*_who(record), record.sequence_id or "-", states, after.ref_count, after.generation, record.explanation)
        )
    headings = [("SEQUENCE", False), ("STATE", False), ("REFS", True), ("GENERATION", True), ("WHAT", False)]
    _print(headings, rows)


def _print_sequence(found: admin_pb2.HistoryResponse) -> None:
    """Prints one line a change of a table."""
    rows = []
    for record in found.records:
        facts = record.sequence_after if record.HasField("sequence_after") else record.sequence_before
        figures = (facts.token_count, facts.written_token_count, facts.block_count)
        rows.append((*_who(record), record.sequence_id, *figures, record.explanation))
    _print([("SEQUENCE", False), ("TOKENS", True), ("WRITTEN", True), ("BLOCKS", True), ("WHAT", False)], rows)


def _print(headings: list[tuple[str, bool]], rows: Sequence[tuple[object, ...]]) -> None:
    if rows:
        print_table([*_HEADINGS, *headings], rows)
    else:
        console().print("Nothing happened to it since the log begins.")
