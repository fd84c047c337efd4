"""Turns of sessions, one at a time for each: where the table of sessions is, in this process or another."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from gateway.core.session import Session, SessionTable


class Turns(Protocol):
    """Begins and ends turns."""

    async def begin(self, session_id: str) -> Session:
        """Returns a session, which has a turn under way from now on.

        Raises:
            SessionNotFoundError: there is none (any more).
            SessionBusyError: it has one already.
            NotReadyError: the engine is not connected.
        """
        ...

    async def keep(self, session: Session) -> None:
        """Makes what a turn has made of its session the session; raises NotReadyError as `begin`."""
        ...

    async def end(self, session: Session) -> None:
        """Ends the turn under way, if it has not ended; what was not kept is forgotten."""
        ...


class TableTurns:
    """Turns of a table in this process: the session that a turn changes is the table's own."""

    def __init__(self, table: SessionTable) -> None:
        self._table = table

    async def begin(self, session_id: str) -> Session:
        """See Turns."""
        return self._table.begin_turn(session_id, asyncio.get_running_loop().time())

    async def keep(self, session: Session) -> None:
        """See Turns."""

    async def end(self, session: Session) -> None:
        """See Turns."""
        self._table.end_turn(session, asyncio.get_running_loop().time())
