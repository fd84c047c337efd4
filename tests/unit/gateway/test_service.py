"""What the service makes of a call before it is a request."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.config import GatewayConfig
from gateway.service import GenerationService
from quire.errors import InvalidRequestError


class Call:
    """A call with metadata."""

    def __init__(self, *metadata: tuple[str, Any]) -> None:
        self._metadata = metadata

    def invocation_metadata(self) -> tuple[tuple[str, Any], ...]:
        """Returns the metadata."""
        return self._metadata


def service() -> GenerationService:
    """Returns a service behind a proxy that names tenants."""
    return GenerationService(None, GatewayConfig(tenant_metadata="x-tenant"))  # type: ignore[arg-type]


def test_the_tenant_is_what_the_proxy_says() -> None:
    """Shares, quotas and caches of one customer would otherwise be another's."""
    call: Any = Call(("other", "x"), ("x-tenant", "acme"))
    assert service()._tenant(call) == "acme"


@pytest.mark.parametrize(
    "metadata",
    [[], [("x-tenant", "a"), ("x-tenant", "b")], [("x-tenant", "")], [("x-tenant", "a b")], [("x-tenant", b"a")]],
)
def test_a_call_without_one_clear_tenant_is_refused(metadata: list[tuple[str, Any]]) -> None:
    """A proxy that is passed by, or a client that adds a name of its own, must not choose whose cache it reads."""
    call: Any = Call(*metadata)
    with pytest.raises(InvalidRequestError, match="metadata x-tenant: found"):
        service()._tenant(call)
