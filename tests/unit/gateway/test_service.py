"""What the service makes of a call before it is a request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gateway.config import GatewayConfig
from gateway.service import GenerationService
from gateway.session_service import SessionService
from gateway.tenants import tenant_of
from protos.gateway.v1 import gateway_pb2 as pb
from protos.gateway.v1 import session_pb2
from quire.errors import AdmissionError, InvalidRequestError, QuireError


class Call:
    """A call with metadata."""

    def __init__(self, *metadata: tuple[str, Any]) -> None:
        self._metadata = metadata

    def invocation_metadata(self) -> tuple[tuple[str, Any], ...]:
        """Returns the metadata."""
        return self._metadata


def test_the_tenant_is_what_the_proxy_says() -> None:
    """Shares, quotas and caches of one customer would otherwise be another's."""
    call: Any = Call(("other", "x"), ("x-tenant", "acme"))
    assert tenant_of(call, "x-tenant") == "acme"
    assert tenant_of(call, "") == ""


@pytest.mark.parametrize(
    "metadata",
    [[], [("x-tenant", "a"), ("x-tenant", "b")], [("x-tenant", "")], [("x-tenant", "a b")], [("x-tenant", b"a")]],
)
def test_a_call_without_one_clear_tenant_is_refused(metadata: list[tuple[str, Any]]) -> None:
    """A proxy that is passed by, or a client that adds a name of its own, must not choose whose cache it reads."""
    call: Any = Call(*metadata)
    with pytest.raises(InvalidRequestError, match="metadata x-tenant: found"):
        tenant_of(call, "x-tenant")


async def test_a_request_that_finds_the_queue_full_is_refused_before_its_prompt_is_looked_at() -> None:
    """In a flood every refusal would otherwise cost as much as a request, and the flood would win."""

    def refuse(request_id: str, model: str) -> None:
        raise AdmissionError(f"{model} is full")

    # Without a tokenizer: whoever looks at the prompt fails.
    engine: Any = SimpleNamespace(find_model=lambda _: SimpleNamespace(name="m"), check_request=refuse)
    call: Any = Call()
    request = pb.GenerateStreamRequest(spec=pb.GenerationSpec(text="a long story " * 1000))
    with pytest.raises(AdmissionError, match="m is full"):
        await GenerationService(engine, GatewayConfig()).GenerateStream(request, call)


async def test_no_tenant_reaches_or_sees_the_sessions_of_another() -> None:
    """A conversation is what its tenant would least like to share, and its id is easy to guess if a client chose it."""
    engine: Any = SimpleNamespace(find_model=lambda _: SimpleNamespace(name="m"))
    sessions: Any = SessionService(engine, GatewayConfig(tenant_metadata="x-tenant"))
    acme, other = Call(("x-tenant", "acme")), Call(("x-tenant", "other"))
    for call in (acme, other):
        made = await sessions.CreateSession(session_pb2.CreateSessionRequest(session_id="talk"), call)
        assert made.session.session_id == "talk"
    await sessions.CreateSession(session_pb2.CreateSessionRequest(session_id="more"), acme)
    with pytest.raises(QuireError, match="more"):
        await sessions.GetSession(session_pb2.GetSessionRequest(session_id="more"), other)
    with pytest.raises(QuireError, match="acme"):
        await sessions.GetSession(session_pb2.GetSessionRequest(session_id="acme/more"), other)
    first = await sessions.ListSessions(session_pb2.ListSessionsRequest(page_size=1), acme)
    assert ([session.session_id for session in first.sessions], first.next_page_token) == (["more"], "more")
    rest = await sessions.ListSessions(session_pb2.ListSessionsRequest(page_token="more"), acme)
    assert ([session.session_id for session in rest.sessions], rest.next_page_token) == (["talk"], "")
    await sessions.DeleteSession(session_pb2.DeleteSessionRequest(session_id="talk"), other)
    assert (await sessions.GetSession(session_pb2.GetSessionRequest(session_id="talk"), acme)).session.session_id
