"""Whose call it is: what a proxy that the operator trusts says of it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from quire.errors import InvalidRequestError

if TYPE_CHECKING:
    import grpc

_TENANT = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def tenant_of(context: grpc.aio.ServicerContext[Any, Any], key: str) -> str:
    """Returns the tenant of a call, empty where all calls are of one.

    Args:
        context: of the call.
        key: metadata key in which the proxy names the tenant; empty if there is no such proxy.

    Raises:
        InvalidRequestError: the metadata does not name exactly one tenant.
    """
    if not key:
        return ""
    values = [value for name, value in context.invocation_metadata() or () if name == key]
    if len(values) != 1 or not isinstance(values[0], str) or not _TENANT.fullmatch(values[0]):
        found = f"{len(values)} values" if len(values) != 1 else repr(values[0])
        message = f"metadata {key}: found {found}, expected one name of 1 .. 128 characters of [A-Za-z0-9._:-]"
        raise InvalidRequestError(message, field=key)
    return values[0]
