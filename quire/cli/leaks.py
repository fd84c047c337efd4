"""`quire leaks`: what gateways hold, and since when."""

from __future__ import annotations

from typing import Annotated

import typer

from quire.cli import options
from quire.cli.admin import AdminClient
from quire.cli.output import format_seconds, notices, print_json, print_table


def leaks(
    *,
    pool: Annotated[str, typer.Option(help="Only this pool.")] = "",
    older_than: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Only what is held for so long.")] = 60.0,
    memsvc: options.Memsvc = options.MEMSVC_ADDRESS,
    json: options.Json = False,
) -> None:
    """List the blocks that gateways hold for long: tables of sequences, and growth leases, the oldest first.

    For example:

        quire leaks

        quire leaks --older-than 3600
    """
    with AdminClient(memsvc) as admin:
        found = admin.leaks(pool, older_than)
    if json:
        print_json(found)
        return
    headings = [("AGE", True), ("BLOCKS", True), ("GATEWAY", False), ("SEQUENCE", False), ("TENANT", False)]
    rows = [
        (
            *(format_seconds(one.age), one.block_count, one.gateway_id + (" (gone)" if one.closing else "")),
            *(one.sequence_id or "(growth lease)", one.tenant or "-", one.pool_id),
        )
        for one in found
    ]
    print_table([*headings, ("POOL", False)], rows)
    if not found:
        notices().print(f"nothing is held for {older_than:g} s or longer")
