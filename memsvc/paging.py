"""Pages of long lists (AIP-158): sizes, and tokens that lead to the next page of one list only."""

from __future__ import annotations

import base64
import binascii

from quire.errors import InvalidRequestError

LIST_DEFAULT, LIST_MAXIMUM = 100, 1000
_PAGE_TOKEN_LENGTH_MAXIMUM = 1024
_CURSOR_MAXIMUM = 2**63


def page_size(requested: int, default: int, maximum: int) -> int:
    """Returns how many items a page has."""
    return min(requested, maximum) if requested else default


def write_page_token(kind: str, cursor: str) -> str:
    """Returns the opaque token of the page after `cursor`. `kind` ties it to one list."""
    return base64.urlsafe_b64encode(f"{kind}:{cursor}".encode()).decode()


def read_page_token(kind: str, token: str) -> str:
    """Returns the cursor in a token, empty for the first page.

    Raises:
        InvalidRequestError: not a token of this list.
    """
    if not token:
        return ""
    try:
        if len(token) > _PAGE_TOKEN_LENGTH_MAXIMUM:
            raise ValueError
        found, separator, cursor = base64.b64decode(token, altchars=b"-_", validate=True).decode().partition(":")
        if found != kind or not separator:
            raise ValueError
    except (ValueError, binascii.Error):
        message = "page_token: is not a token that this list gave"
        raise InvalidRequestError(message, field="page_token") from None
    return cursor


def read_number(kind: str, token: str, first: int) -> int:
    """Returns the number in a page token, `first` for the first page; raises as `read_page_token`."""
    cursor = read_page_token(kind, token)
    if not cursor:
        return first
    if not (cursor.isascii() and cursor.isdigit()) or int(cursor) >= _CURSOR_MAXIMUM:
        raise InvalidRequestError("page_token: is not a token that this list gave", field="page_token")
    return int(cursor)
