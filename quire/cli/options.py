"""Options that several commands have."""

from typing import Annotated, Final, TypeAlias

import typer

from quire.client import DEFAULT_ADDRESS
from quire.serve.plan import LOOPBACK, MEMSVC_PORT

GATEWAY_ADDRESS: Final = DEFAULT_ADDRESS
MEMSVC_ADDRESS: Final = f"{LOOPBACK}:{MEMSVC_PORT}"

Address: TypeAlias = Annotated[
    str, typer.Option("--address", envvar="QUIRE_ADDRESS", metavar="HOST:PORT", help="Where the gateway listens.")
]
Memsvc: TypeAlias = Annotated[
    str, typer.Option("--memsvc", envvar="QUIRE_ADMIN_ADDRESS", metavar="HOST:PORT", help="Where memsvc listens.")
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
