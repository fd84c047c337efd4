"""What measurements and simulations print: one JSON document, also where they fail.

The other side of it is `quire.cli.measuring`.
"""

from __future__ import annotations

from collections.abc import Callable
import json
import sys
from typing import Any

from quire.errors import QuireError
from quire.logging import configure_logging


def print_document(make: Callable[[], dict[str, Any]], service: str) -> int:
    """Prints what `make` returns, or {"error": {reason, message, field}}, and returns the exit status: 0, or 1.

    Args:
        make: measures; may raise QuireError, or return a document with an "error" itself.
        service: as which the process logs.
    """
    configure_logging("error", "json", service=service)
    try:
        document = make()
    except QuireError as error:
        document = {"error": {"reason": error.reason, "message": error.message, "field": error.field}}
    sys.stdout.write(json.dumps(document) + "\n")
    return 1 if "error" in document else 0
