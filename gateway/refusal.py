"""The error for a field that a client has set to what is not allowed."""

from __future__ import annotations

import re

from quire.errors import InvalidRequestError


def refusal(field: str, found: object, allowed: str) -> InvalidRequestError:
    """Returns the error for a field out of range."""
    reason = "INVALID_" + re.sub(r"[^A-Z0-9]+", "_", field.rpartition(".")[2].upper()).strip("_")
    return InvalidRequestError(f"{field}: found {found}, allowed is {allowed}", field=field, reason=reason)
