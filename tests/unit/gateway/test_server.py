"""What a gateway's process fills in of its settings."""

from __future__ import annotations

from gateway.config import GatewayConfig
from gateway.server import complete


def test_a_gateway_is_named_by_its_port_and_by_chance_where_the_port_is_not_known() -> None:
    """Two of one name would drive each other out of the memory service."""
    assert complete(GatewayConfig(port=50051)).gateway_id.endswith(":50051")
    assert complete(GatewayConfig(port=0), 4711).gateway_id.endswith(":4711")
    names = {complete(GatewayConfig(port=0)).gateway_id for _ in range(10)}
    assert len(names) == 10
    assert complete(GatewayConfig(port=0, gateway_id="mine")).gateway_id == "mine"
