"""Sessions: conversations that are kept as tokens, with where their turns end.

Pure: time is an argument, in monotonic seconds. A session that has expired is gone for everybody who asks.
"""

from __future__ import annotations

from array import array
import dataclasses
import heapq
from typing import NamedTuple

from quire.errors import (
    InvalidRequestError,
    SessionBusyError,
    SessionExistsError,
    SessionLimitError,
    SessionNotFoundError,
)


class Message(NamedTuple):
    """One message of a chat."""

    role: str
    content: str


@dataclasses.dataclass(frozen=True, slots=True)
class TurnEnd:
    """Where a session stood when a turn had been answered."""

    token_count: int
    message_count: int
    text_length: int


@dataclasses.dataclass(slots=True)
class Session:
    """One conversation."""

    session_id: str
    model: str
    ttl: float
    """Seconds without a turn after which it ends."""
    expires_at: float
    parent_id: str = ""
    tokens: array[int] = dataclasses.field(default_factory=lambda: array("I"))
    turns: list[TurnEnd] = dataclasses.field(default_factory=list)
    messages: list[Message] = dataclasses.field(default_factory=list)
    """Of a chat, as far as it is known in messages."""
    text: str = ""
    """Of a chat: what the tokens spell, as the chat template writes it."""
    busy: bool = False

    @property
    def is_chat(self) -> bool:
        """Whether it goes on with messages."""
        return bool(self.messages)


class SessionTable:
    """The sessions of one gateway.

    Args:
        limit: most sessions at a time.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._sessions: dict[str, Session] = {}
        # (expiry, id); an entry that says another time than its session is left over.
        self._expiries: list[tuple[float, str]] = []

    def __len__(self) -> int:
        """Sessions that are kept, expired ones that nobody has asked for since included."""
        return len(self._sessions)

    def create(self, session_id: str, model: str, ttl: float, now: float) -> Session:
        """Opens an empty session.

        Raises:
            SessionExistsError: the id is taken.
            SessionLimitError: there are as many as may be.
        """
        self.expire(now)
        self._check_room([session_id], now)
        return self._enter(Session(session_id, model, ttl, now + ttl), now)

    def get(self, session_id: str, now: float) -> Session:
        """Returns a session.

        Raises:
            SessionNotFoundError: it never was, has been deleted, or has expired.
        """
        self.expire(now)
        session = self._sessions.get(session_id)
        if session is None:
            message = (
                f"session_id: found {session_id!r}, which is no session here: sessions expire, and end with a gateway"
            )
            raise SessionNotFoundError(message, field="session_id")
        return session

    def begin_turn(self, session_id: str, now: float) -> Session:
        """Returns a session, which has a turn under way from now on and does not expire.

        Raises:
            SessionNotFoundError: as `get`.
            SessionBusyError: it has one already.
        """
        session = self.get(session_id, now)
        if session.busy:
            message = f"session_id: a turn of {session_id!r} is under way; wait for it, cancel it, or fork the session"
            raise SessionBusyError(message, field="session_id", retry_after=1.0)
        session.busy = True
        return session

    def end_turn(self, session: Session, now: float) -> None:
        """Ends the turn under way; the session has its whole time to live again."""
        session.busy = False
        if self._sessions.get(session.session_id) is session:
            self._renew(session, now)

    def fork(self, source_id: str, new_ids: list[str], at_token: int | None, now: float) -> list[Session]:
        """Opens sessions with the leading `at_token` tokens of another, all by default.

        Raises:
            SessionNotFoundError: as `get`.
            InvalidRequestError: it has fewer tokens.
            SessionExistsError, SessionLimitError: as `create`.
        """
        source = self.get(source_id, now)
        count = len(source.tokens) if at_token is None else at_token
        if count > len(source.tokens):
            message = f"at_token: found {count}, allowed is 0 .. {len(source.tokens)}, the tokens of the session"
            raise InvalidRequestError(message, field="at_token", reason="INVALID_AT_TOKEN")
        self._check_room(new_ids, now)
        turns = [turn for turn in source.turns if turn.token_count <= count]
        end = turns[-1] if turns and turns[-1].token_count == count else None
        return [
            self._enter(
                Session(
                    new_id,
                    source.model,
                    source.ttl,
                    now + source.ttl,
                    parent_id=source_id,
                    tokens=source.tokens[:count],
                    turns=list(turns),
                    messages=source.messages[: end.message_count] if end else [],
                    text=source.text[: end.text_length] if end else "",
                ),
                now,
            )
            for new_id in new_ids
        ]

    def delete(self, session_id: str, now: float) -> None:
        """Ends a session; a turn under way goes on and is forgotten. Raises SessionNotFoundError as `get`."""
        self.get(session_id, now)
        del self._sessions[session_id]

    def page(self, after: str, size: int, now: float) -> list[Session]:
        """Returns the first `size` sessions whose ids are greater than `after`, by id."""
        self.expire(now)
        later = (session for session in self._sessions.values() if session.session_id > after)
        return heapq.nsmallest(size, later, key=lambda session: session.session_id)

    def expire(self, now: float) -> None:
        """Ends what has expired."""
        while self._expiries and self._expiries[0][0] <= now:
            at, session_id = heapq.heappop(self._expiries)
            session = self._sessions.get(session_id)
            if session is not None and session.expires_at == at and not session.busy:
                del self._sessions[session_id]

    def _enter(self, session: Session, now: float) -> Session:
        self._sessions[session.session_id] = session
        self._renew(session, now)
        return session

    def _renew(self, session: Session, now: float) -> None:
        session.expires_at = now + session.ttl
        if len(self._expiries) > 2 * len(self._sessions) + 64:
            self._expiries = [(known.expires_at, known.session_id) for known in self._sessions.values()]
            heapq.heapify(self._expiries)
        heapq.heappush(self._expiries, (session.expires_at, session.session_id))

    def _check_room(self, new_ids: list[str], now: float) -> None:
        """Raises SessionExistsError or SessionLimitError unless sessions of these ids may be opened."""
        for session_id in new_ids:
            if session_id in self._sessions:
                raise SessionExistsError(f"session_id: {session_id!r} is the id of a session", field="session_id")
        if len(self._sessions) + len(new_ids) > self._limit:
            message = (
                f"sessions: {len(self._sessions)} are open and {len(new_ids)} asked for, allowed are {self._limit}"
            )
            raise SessionLimitError(message, retry_after=max(1.0, self._next_expiry(now)))

    def _next_expiry(self, now: float) -> float:
        """Returns the seconds until a session may expire."""
        return self._expiries[0][0] - now if self._expiries else 0.0
