"""How gRPC waits is changed only where it was measured."""

from quire.polling import poll_in_place


def test_sockets_are_polled_in_place_only_by_versions_that_were_measured() -> None:
    """An experiment that another version does not know is an error in its log, and the operator's word goes first."""
    found: dict[str, str] = {}
    poll_in_place(found, "1.85.1")
    assert "-event_engine_client" in found["GRPC_EXPERIMENTS"]
    for version in ("1.75.0", "1.86.0", "2.0.0rc1"):
        found = {}
        poll_in_place(found, version)
        assert not found
    found = {"GRPC_EXPERIMENTS": "mine"}
    poll_in_place(found)
    assert found == {"GRPC_EXPERIMENTS": "mine"}
