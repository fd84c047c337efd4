"""`quire pools`, `sequences`, `blocks`, `block` and `health`: looks into running services."""

from __future__ import annotations

from typing import Annotated

from rich.text import Text
import typer

from quire.cli import options
from quire.cli.admin import AdminClient
from quire.cli.drawing import SEQUENCE_COLUMNS, draw_block_table, draw_pool, sequence_row
from quire.cli.output import console, format_seconds, notices, print_json, print_table, state_name
from quire.errors import QuireError, UnsupportedError
from quire.healthcheck import check
from quire.serve.plan import EXECSVC_PORT, LOOPBACK


def pools(*, memsvc: options.Memsvc = options.MEMSVC_ADDRESS, json: options.Json = False) -> None:
    """Show every KV block pool: where its blocks are and how well they are used.

    For example:

        quire pools

        quire pools --json | jq '.[0].free_block_count'
    """
    with AdminClient(memsvc) as admin:
        found = admin.pools()
    if json:
        print_json(found)
        return
    printer = console()
    for pool in found:
        printer.print(draw_pool(pool, printer.width), soft_wrap=True)
    if not found:
        notices().print("no executor has registered a pool yet")


def sequences(
    *,
    memsvc: options.Memsvc = options.MEMSVC_ADDRESS,
    pool: Annotated[str, typer.Option(help="Only this pool.")] = "",
    json: options.Json = False,
) -> None:
    """List the sequences that hold blocks, oldest first.

    For example:

        quire sequences

        quire sequences --pool executor-0 --json
    """
    with AdminClient(memsvc) as admin:
        found = admin.sequences(pool)
    if json:
        print_json(found)
        return
    print_table(SEQUENCE_COLUMNS, map(sequence_row, found))
    if not found:
        notices().print("no sequence holds blocks now")


def blocks(
    *,
    sequence: Annotated[
        str, typer.Argument(metavar="SEQUENCE", help="Id of the sequence, or a unique beginning of it.")
    ],
    memsvc: options.Memsvc = options.MEMSVC_ADDRESS,
    json: options.Json = False,
) -> None:
    """Draw the block table of a sequence.

    Each block is drawn with its id and how full it is; a dot marks what other prompts can match, xn what n tables
    share.

    For example:

        quire blocks 3f2a

        quire blocks 3f2a9c/0 --json
    """
    with AdminClient(memsvc) as admin:
        table = admin.block_table(sequence)
    if json:
        print_json(table)
        return
    printer = console()
    printer.print(draw_block_table(table, printer.width), soft_wrap=True)


def block(
    *,
    pool: Annotated[str, typer.Argument(metavar="POOL", help="Id of the pool, as `quire pools` shows it.")],
    block_id: Annotated[int, typer.Argument(min=0, max=2**32 - 1, metavar="ID", help="Number of the block.")],
    memsvc: options.Memsvc = options.MEMSVC_ADDRESS,
    json: options.Json = False,
) -> None:
    """Show one block: where it is, who holds it, and why.

    For example:

        quire block executor-0 17
    """
    with AdminClient(memsvc) as admin:
        found = admin.block(pool, block_id)
    if json:
        print_json(found)
        return
    facts = {
        "block": found.block_id,
        "state": f"{state_name(found)} for {format_seconds(found.since)}",
        "why": found.explanation,
        "references": found.ref_count,
        "sequences": ", ".join(found.sequence_ids) or "-",
        "leased to": found.leased_to or "-",
        "generation": found.generation,
        "identity": found.identity.hex() or "-",
    }
    for name, value in facts.items():
        console().print(Text.assemble((f"{name:<12}", "bold"), str(value)), soft_wrap=True)


def _executor_addresses(memsvc: str) -> list[str]:
    """Returns where memsvc knows executors; the default address if it does not answer."""
    try:
        with AdminClient(memsvc) as admin:
            return [pool.executor_address for pool in admin.pools()]
    except UnsupportedError:
        # Everything is in one process: its executor has no address.
        return []
    except QuireError:
        return [f"{LOOPBACK}:{EXECSVC_PORT}"]


def health(
    *,
    address: options.Address = options.GATEWAY_ADDRESS,
    memsvc: options.Memsvc = options.MEMSVC_ADDRESS,
    execsvc: Annotated[
        list[str] | None, typer.Option(metavar="HOST:PORT", help="Executor; those that memsvc knows if not given.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Ask every service whether it serves; exit status 0 only if all do.

    For example:

        quire health

        quire health --address 10.0.0.5:50051 --memsvc 10.0.0.5:50061
    """
    wanted = [("gateway", address), ("memsvc", memsvc)]
    wanted += [("execsvc", one) for one in execsvc or _executor_addresses(memsvc)]
    states = [(name, where, check(where)) for name, where in wanted]
    if json:
        print_json([{"service": name, "address": where, "state": state} for name, where, state in states])
    else:
        style = {"SERVING": "green"}
        rows = [(name, where, Text(state, style.get(state, "red"))) for name, where, state in states]
        print_table([("SERVICE", False), ("ADDRESS", False), ("STATE", False)], rows)
    if any(state != "SERVING" for _, _, state in states):
        raise typer.Exit(1)
