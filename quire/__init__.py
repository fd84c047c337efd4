"""What the services share and what a user imports.

The public client is `quire.Client` and `quire.AsyncClient`; the errors that they raise are in `quire.errors`.
"""

from importlib import metadata
from pathlib import Path
import tomllib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quire.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client", "__version__"]


def _version() -> str:
    """Returns the version as installed; that of pyproject.toml where the sources are run as they lie."""
    try:
        return metadata.version("quire")
    except metadata.PackageNotFoundError:
        project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8"))
        return str(project["project"]["version"])


__version__ = _version()


def __getattr__(name: str) -> Any:
    """Imports the client on first use, so that services do not pay for it."""
    if name in {"AsyncClient", "Client"}:
        from quire import client  # noqa: PLC0415 - lazy on purpose

        return getattr(client, name)
    message = f"module 'quire' has no attribute {name!r}"
    raise AttributeError(message)
