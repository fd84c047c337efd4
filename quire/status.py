"""QuireError <-> google.rpc.Status: the one table between exceptions and what travels in trailers."""

from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
import grpc
from grpc_status import rpc_status

from quire import errors

DOMAIN = "quire"


def _error_classes(root: type[errors.QuireError]) -> list[type[errors.QuireError]]:
    """Returns `root` and everything below it."""
    return [root, *(found for child in root.__subclasses__() for found in _error_classes(child))]


_CLASS_BY_REASON = {cls.default_reason: cls for cls in _error_classes(errors.QuireError)}
_CODE_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}
_CLASS_BY_CODE = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequestError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.AdmissionError,
    grpc.StatusCode.ABORTED: errors.StaleEpochError,
    grpc.StatusCode.UNAVAILABLE: errors.NotReadyError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineError,
    grpc.StatusCode.CANCELLED: errors.RequestCancelledError,
    grpc.StatusCode.UNIMPLEMENTED: errors.UnsupportedError,
}


def _pack(
    message: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo,
) -> any_pb2.Any:
    """Returns `message` as an Any."""
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def to_status(error: errors.QuireError) -> status_pb2.Status:
    """Returns the google.rpc.Status of `error`: ErrorInfo always, BadRequest for a field, RetryInfo for a delay."""
    details = [_pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata))]
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=error.message, reason=error.reason
        )
        details.append(_pack(error_details_pb2.BadRequest(field_violations=[violation])))
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status_pb2.Status(code=error.code.value[0], message=error.message, details=details)


def to_grpc(error: errors.QuireError) -> grpc.Status:
    """Returns what `ServicerContext.abort_with_status` takes."""
    status: grpc.Status = rpc_status.to_status(to_status(error))
    return status


def from_rpc_error(error: grpc.RpcError) -> errors.QuireError:
    """Returns the QuireError that a failed call carries.

    The class follows the reason of ErrorInfo, else the status code; the message is the server's.
    """
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError), type(error)
    code = error.code()
    return _from_details(code, error.details() or code.name, rpc_status.from_call(error))


def from_status(status: status_pb2.Status) -> errors.QuireError:
    """Returns the error that `to_status` has made this of."""
    code = _CODE_BY_NUMBER.get(status.code, grpc.StatusCode.UNKNOWN)
    return _from_details(code, status.message or code.name, status)


def _from_details(code: grpc.StatusCode, message: str, status: status_pb2.Status | None) -> errors.QuireError:
    """Returns the error of a status: ErrorInfo names its class, else the code does."""
    reason, metadata, field, retry_after = None, {}, None, None
    for detail in status.details if status is not None else ():
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Is(bad.DESCRIPTOR):
            detail.Unpack(bad)
            field = bad.field_violations[0].field if bad.field_violations else None
        elif detail.Is(retry.DESCRIPTOR):
            detail.Unpack(retry)
            retry_after = retry.retry_delay.ToNanoseconds() / 1e9
    cls = _CLASS_BY_REASON.get(reason or "") or _CLASS_BY_CODE.get(code, errors.QuireError)
    found = cls(message, reason=reason or code.name, field=field, metadata=metadata, retry_after=retry_after)
    found.__dict__["code"] = code
    return found
