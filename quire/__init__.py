"""What the services share and what a user imports.

The public client is `quire.Client` and `quire.AsyncClient`; the errors that they raise are in `quire.errors`.
"""

from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quire.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client", "__version__"]

__version__ = metadata.version("quire")


def __getattr__(name: str) -> Any:
    """Imports the client on first use, so that services do not pay for it."""
    if name in {"AsyncClient", "Client"}:
        from quire import client  # noqa: PLC0415 - lazy on purpose

        return getattr(client, name)
    message = f"module 'quire' has no attribute {name!r}"
    raise AttributeError(message)
