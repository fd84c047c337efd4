"""`python -m memsvc`: runs the memory service. Exit status: 0 ok, 1 failure, 2 bad settings, 130 interrupted."""

import asyncio
import os
import sys

from memsvc.config import MemsvcConfig
from memsvc.server import serve
from quire.config import load
from quire.errors import ConfigError
from quire.logging import configure_logging

_EPILOG = """examples:
  python -m memsvc
  python -m memsvc --port 50061 --store redis://127.0.0.1:6379/0
"""


def main() -> None:
    """Runs the command."""
    try:
        config, sources = load(MemsvcConfig, "memsvc", sys.argv[1:], os.environ, epilog=_EPILOG)
        configure_logging(config.log_level, config.log_format, service="memsvc")
        status = asyncio.run(serve(config, sources))
    except ConfigError as error:
        sys.stderr.write(f"memsvc: {error.message}\n")
        sys.exit(2)
    sys.exit(status)


if __name__ == "__main__":
    main()
