"""`quire reset`: commands to the prefix cache of a pool."""

from __future__ import annotations

from typing import Annotated

import typer

from quire.cli import options
from quire.cli.admin import AdminClient
from quire.cli.output import console, print_json

Pool = Annotated[str, typer.Argument(metavar="POOL", help="Id of the pool, as `quire pools` shows it.")]


def reset(
    *,
    pool: Pool,
    force: Annotated[
        bool, typer.Option("--force", help="Also while sequences run: they are queued and computed again.")
    ] = False,
    memsvc: options.Memsvc = options.MEMSVC_ADDRESS,
    json: options.Json = False,
) -> None:
    """Forget everything that prompts can match in a pool.

    Refused while sequences hold blocks, unless forced; their clients then see a pause, and every token once.

    For example:

        quire reset executor-0

        quire reset executor-0 --force
    """
    with AdminClient(memsvc) as admin:
        done = admin.reset_cache(pool, force=force)
    if json:
        print_json(done)
        return
    console().print(f"{done.block_count} blocks of {pool} were forgotten; the pool is in epoch {done.epoch}")
