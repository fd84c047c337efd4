"""Errors survive the way over the wire."""

from google.protobuf import any_pb2
from google.rpc import error_details_pb2
import grpc
import pytest

from quire import errors, status


class FailedCall(grpc.RpcError, grpc.Call):  # type: ignore[misc]
    """What grpc raises at a client, made of the status that a server sent."""

    def __init__(self, sent: grpc.Status) -> None:
        """Keeps the status."""
        self._sent = sent

    def code(self) -> grpc.StatusCode:
        """Returns the code."""
        return self._sent.code

    def details(self) -> str:
        """Returns the message."""
        return str(self._sent.details)

    def trailing_metadata(self) -> object:
        """Returns the trailers, which carry the details."""
        return self._sent.trailing_metadata


FailedCall.__abstractmethods__ = frozenset()


def over_the_wire(error: errors.QuireError) -> errors.QuireError:
    """Returns what a client makes of what a server raised."""
    return status.from_rpc_error(FailedCall(status.to_grpc(error)))


def all_classes() -> list[type[errors.QuireError]]:
    """Returns every class of the tree."""

    def below(cls: type[errors.QuireError]) -> list[type[errors.QuireError]]:
        return [found for child in cls.__subclasses__() for found in (child, *below(child))]

    return [cls for cls in below(errors.QuireError) if cls.__module__ == errors.__name__]


@pytest.mark.parametrize("cls", all_classes(), ids=lambda cls: cls.__name__)
def test_every_error_comes_back_as_itself(cls: type[errors.QuireError]) -> None:
    """A client that catches PromptTooLongError must get it, not something like it."""
    sent = cls("what happened", field="prompt", metadata={"needed": 5}, retry_after=1.5)
    got = over_the_wire(sent)
    assert type(got) is cls
    assert (got.message, got.reason, got.field) == (sent.message, sent.reason, "prompt")
    assert got.metadata == {"needed": "5"}
    assert got.retry_after == pytest.approx(1.5)
    assert got.code is cls.code


def test_a_reason_of_its_own_keeps_the_family_of_the_status() -> None:
    """A newer server's reason must still land in the class that an older client handles."""
    got = over_the_wire(errors.AdmissionError("waited too long", reason="QUEUE_TIMEOUT"))
    assert type(got) is errors.AdmissionError
    assert got.reason == "QUEUE_TIMEOUT"


def test_a_field_travels_as_a_bad_request_and_a_delay_as_retry_info() -> None:
    """Clients in other languages read the standard details, not our Python."""
    wire = status.to_status(errors.AdmissionError("full", field="spec", retry_after=0.25))
    found = {detail.type_url.rpartition("/")[2] for detail in wire.details}
    assert found == {"google.rpc.ErrorInfo", "google.rpc.BadRequest", "google.rpc.RetryInfo"}
    info = error_details_pb2.ErrorInfo()
    packed: any_pb2.Any = wire.details[0]
    packed.Unpack(info)
    assert (info.domain, info.reason) == ("quire", "QUEUE_FULL")


def test_a_status_without_details_is_mapped_by_its_code() -> None:
    """A proxy between client and server answers with a bare status."""
    bare = FailedCall(status.to_grpc(errors.DeadlineError("too late"))._replace(trailing_metadata=()))
    got = status.from_rpc_error(bare)
    assert type(got) is errors.DeadlineError
    assert got.message == "too late"
