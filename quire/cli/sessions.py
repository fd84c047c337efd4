"""`quire sessions`: the conversations that a gateway keeps."""

from __future__ import annotations

from typing import Annotated

import typer

from quire.cli import options
from quire.cli.output import notices, print_json, print_table
from quire.client import Client


def sessions(
    *,
    delete: Annotated[list[str] | None, typer.Option(metavar="SESSION", help="End this one; may be repeated.")] = None,
    address: options.Address = options.GATEWAY_ADDRESS,
    json: options.Json = False,
) -> None:
    """Show the conversations that a gateway keeps between turns, and end some.

    For example:

        quire sessions

        quire sessions --delete 21d65631cbed1c2b
    """
    with Client(address) as client:
        for session_id in delete or ():
            client.delete_session(session_id)
        found = client.list_sessions()
    if json:
        print_json(list(found))
        return
    if not found:
        notices().print("no session is kept; `quire chat` opens one, and so does `Client.create_session`")
        return
    print_table(
        [("SESSION", False), ("TURNS", True), ("TOKENS", True), ("EXPIRES IN", True), ("", False), ("PARENT", False)],
        [
            (
                session.session_id,
                session.turn_count,
                session.token_count,
                f"{session.expires_in_seconds:.0f} s",
                "busy" if session.busy else "",
                session.parent_session_id,
            )
            for session in found
        ],
    )
