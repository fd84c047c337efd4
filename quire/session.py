"""Sessions, as clients see them."""

import dataclasses

from google.protobuf import duration_pb2

from protos.gateway.v1 import session_pb2
from quire.errors import InvalidRequestError


@dataclasses.dataclass(frozen=True, slots=True)
class Session:
    """A conversation that the gateway keeps."""

    session_id: str
    model: str
    token_count: int
    turn_count: int
    """Turns that were answered."""
    ttl_seconds: float
    """Time without a turn after which it ends."""
    expires_in_seconds: float
    busy: bool
    """Whether a turn is under way."""
    parent_session_id: str
    """Session that it was forked from; empty for none."""


def session_from(wire: session_pb2.Session) -> Session:
    """Returns a session."""
    return Session(
        wire.session_id,
        wire.model,
        wire.token_count,
        wire.turn_count,
        wire.ttl.ToNanoseconds() / 1e9,
        wire.expires_in.ToNanoseconds() / 1e9,
        wire.busy,
        wire.parent_session_id,
    )


def create_request(session_id: str, model: str, ttl: float | None) -> session_pb2.CreateSessionRequest:
    """Returns the request that opens a session; raises InvalidRequestError if `ttl` is no number of seconds."""
    request = session_pb2.CreateSessionRequest(session_id=session_id, model=model)
    if ttl is not None:
        try:
            request.ttl.CopyFrom(duration_pb2.Duration(seconds=int(ttl), nanos=int(ttl % 1 * 1e9)))
        except (TypeError, ValueError, OverflowError) as error:
            message = f"ttl: found {ttl!r}, allowed is a number of seconds"
            raise InvalidRequestError(message, field="ttl") from error
    return request


def fork_request(session_id: str, count: int, at_token: int | None) -> session_pb2.ForkSessionRequest:
    """Returns the request that forks a session."""
    return session_pb2.ForkSessionRequest(session_id=session_id, count=count, at_token=at_token)
