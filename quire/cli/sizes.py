"""`quire sizes`: what the recent traffic would have found in pools of other sizes."""

from __future__ import annotations

from typing import Annotated

import typer

from quire.cli import options
from quire.cli.admin import AdminClient
from quire.cli.cache import Pool
from quire.cli.output import console, format_seconds, notices, print_json, print_table

_BLOCKS_MAXIMUM = 2**32 - 1


def sizes(
    *,
    pool: Pool,
    blocks: Annotated[
        list[int] | None,
        typer.Option(min=1, max=_BLOCKS_MAXIMUM, metavar="N", help="Size to look at; may be repeated."),
    ] = None,
    block_size: Annotated[
        int, typer.Option(metavar="TOKENS", help="Tokens in a block: 16, 32 or 64; 0: those of the pool.")
    ] = 0,
    memsvc: options.Memsvc = options.MEMSVC_ADDRESS,
    json: options.Json = False,
) -> None:
    """Say what share of the recent prompts pools of other sizes would have found cached.

    For example:

        quire sizes executor-0

        quire sizes executor-0 --blocks 4000 --blocks 8000 --block-size 32
    """
    with AdminClient(memsvc) as admin:
        told = admin.simulate(pool, blocks or [], block_size)
    if json:
        print_json(told)
        return
    if not told.query_token_count:
        notices().print("no request has looked for its prompt in the cache, as far back as the command log goes")
        return
    rows = [
        (
            f"{size.block_count:,}",
            f"{size.block_count * told.block_size:,}",
            _share(told.query_token_count, size.hit_token_count),
        )
        for size in told.sizes
    ]
    rows.append(("endless", "", _share(told.query_token_count, told.endless_hit_token_count)))
    print_table([("BLOCKS", True), ("TOKENS", True), ("CACHED", True)], rows)
    found = _share(told.query_token_count, told.hit_token_count)
    console().print(
        f"{told.request_count:,} requests of {told.query_token_count:,} tokens in {format_seconds(told.log_age)}; "
        f"{found} of these tokens were cached",
        highlight=False,
        soft_wrap=True,
    )
    if told.sampled_share < 1:
        notices().print(f"estimated from {told.sampled_share:.2%} of the blocks")


def _share(whole: int, part: int) -> str:
    return f"{part / whole:.1%}"
