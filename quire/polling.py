"""How gRPC waits for its sockets: settled before the library is imported, by the packages of the services."""

from __future__ import annotations

from collections.abc import MutableMapping
from importlib import metadata
import os
from typing import Final

# What these do in other versions nobody has measured.
_FIRST: Final = (1, 76)
_END: Final = (1, 86)
_EXPERIMENTS: Final = "-event_engine_client,-event_engine_listener"


def poll_in_place(environment: MutableMapping[str, str] = os.environ, version: str = "") -> None:
    """Has gRPC read a socket in the thread that waits for it, not hand it on to a pool of threads first.

    That is two changes of threads less for each message, a tenth to a fifth of a round trip on loopback. The library
    reads the variable when it is imported; in a process that has imported it already nothing changes. What the
    environment's GRPC_EXPERIMENTS says is kept.

    Args:
        environment: the process's.
        version: the library's, by default the one that is installed; for one that is not known nothing is changed.
    """
    found = tuple(int(part) for part in (version or metadata.version("grpcio")).split(".")[:2])
    if _FIRST <= found < _END:
        environment.setdefault("GRPC_EXPERIMENTS", _EXPERIMENTS)
