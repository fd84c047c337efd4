"""`quire residencies`: how long blocks stay, and what they are good for meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final

from google.protobuf import duration_pb2
import typer

from protos.memsvc.v1 import admin_pb2
from quire.cli import options
from quire.cli.admin import AdminClient
from quire.cli.output import console, format_seconds, notices, print_json, print_table

_SHARES: Final = (("SHORTEST", 0.0), ("MEDIAN", 0.5), ("9 OF 10", 0.9), ("LONGEST", 1.0))


def residencies(
    *,
    pool: Annotated[str, typer.Argument(metavar="POOL", help="Id of the pool, as `quire pools` shows it.")],
    memsvc: options.Memsvc = options.MEMSVC_ADDRESS,
    json: options.Json = False,
) -> None:
    """Show how long blocks stay before their content is given up, and how much of it they go unused.

    The service follows every n-th block that is taken, with `--residency-every n`. Where most blocks die idle and were
    hit before, a larger pool would find more of them again; where they were never hit, it would not.

    For example:

        quire residencies executor-0
    """
    with AdminClient(memsvc) as admin:
        found = admin.residencies(pool)
    if json:
        print_json(admin_pb2.ListResidenciesResponse(residencies=found))
        return
    if not found:
        notices().print("no block that is followed has come to its end; memsvc follows some with --residency-every")
        return
    hit = [life for life in found if life.accesses]
    print_table(
        [("", False), ("BLOCKS", True), *((name, True) for name, _ in _SHARES)],
        [
            ("stayed", len(found), *_spread([life.lifetime for life in found])),
            ("idle at the end", len(found), *_spread([life.idle for life in found])),
            ("stayed, hit", len(hit), *_spread([life.lifetime for life in hit])),
            ("idle at the end, hit", len(hit), *_spread([life.idle for life in hit])),
        ],
    )
    console().print(f"{len(hit) / len(found):.0%} of {len(found)} blocks were hit at least once", highlight=False)


def _spread(times: Sequence[duration_pb2.Duration]) -> list[str]:
    """Returns the quantiles of `_SHARES`, as text."""
    ordered = sorted(times, key=duration_pb2.Duration.ToNanoseconds)
    return [format_seconds(ordered[round(share * (len(ordered) - 1))]) if ordered else "-" for _, share in _SHARES]
