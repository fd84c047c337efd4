"""`quire quota`: what tenants have of a pool, and what they may have."""

from __future__ import annotations

from typing import Annotated, Any, Final

import typer

from protos.memsvc.v1 import admin_pb2
from quire.cli import options
from quire.cli.admin import AdminClient
from quire.cli.output import notices, print_json, print_table
from quire.errors import InvalidRequestError

_MAXIMUM: Final = 2**32 - 1


def _blocks(text: str) -> Any:
    """Returns an option that takes a number of blocks."""
    return typer.Option(min=0, max=_MAXIMUM, metavar="BLOCKS", help=text)


def quota(
    *,
    pool: Annotated[str, typer.Argument(metavar="POOL", help="Id of the pool, as `quire pools` shows it.")],
    tenant: Annotated[
        str | None, typer.Argument(metavar="[TENANT]", help="Name of the tenant; '' for the default one.")
    ] = None,
    floor: Annotated[int | None, _blocks("Others' pressure leaves it so many, held and cached.")] = None,
    ceiling: Annotated[int | None, _blocks("Its sequences may hold so many.")] = None,
    retained: Annotated[int | None, _blocks("Its requests and sessions may retain so many.")] = None,
    pinned: Annotated[int | None, _blocks("So many may be pinned for it.")] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Take its quota away, before other options.")] = False,
    memsvc: options.Memsvc = options.MEMSVC_ADDRESS,
    json: options.Json = False,
) -> None:
    """Show or change what a tenant may hold and keep of a pool; without TENANT, show all that have a quota.

    What is not given stays as it is. A floor is blocks that the pressure of others does not evict; a ceiling is the
    most blocks that the tenant's sequences may hold.

    For example:

        quire quota executor-0

        quire quota executor-0 team-a --floor 100 --ceiling 2000
    """
    wanted = {"floor": floor, "ceiling": ceiling, "retained": retained, "pinned": pinned}
    changes = {f"{name}_block_count": value for name, value in wanted.items() if value is not None}
    if tenant is None and (changes or clear):
        raise InvalidRequestError("TENANT: is needed to change a quota; '' is the default one", field="tenant")
    with AdminClient(memsvc) as admin:
        if tenant is None:
            found = admin.quotas(pool)
        elif changes or clear:
            new = admin_pb2.Quota() if clear else admin.quota(pool, tenant).quota
            new.MergeFrom(admin_pb2.Quota(**changes))
            for name in ("floor_block_count", "pinned_block_count"):
                # A zero is no change to MergeFrom.
                setattr(new, name, changes.get(name, getattr(new, name)))
            found = [admin.set_quota(pool, tenant, new)]
        else:
            found = [admin.quota(pool, tenant)]
    if json:
        print_json(found)
        return
    headings = ("TENANT", "HELD", "CACHED", "RETAINED", "PINNED", "FLOOR", "CEILING", "MAY RETAIN", "MAY PIN")
    print_table([(heading, heading != "TENANT") for heading in headings], [_row(one) for one in found])
    if not found:
        notices().print("no tenant of this pool has a quota")


def _row(usage: admin_pb2.TenantUsage) -> tuple[object, ...]:
    """Returns a tenant as a row of the table."""
    quota = usage.quota
    ceiling = quota.ceiling_block_count if quota.HasField("ceiling_block_count") else "-"
    retained = quota.retained_block_count if quota.HasField("retained_block_count") else "-"
    return (
        *(usage.tenant or "(default)", usage.held_block_count, usage.cached_block_count),
        *(usage.retained_block_count, usage.pinned_block_count),
        *(quota.floor_block_count, ceiling, retained, quota.pinned_block_count),
    )
