"""`python -m gateway`: runs the gateway."""

import asyncio
import os
import sys

from gateway.config import GatewayConfig
from quire.config import load
from quire.errors import QuireError
from quire.logging import configure_logging

EXAMPLES = """examples:
  quire gateway --memsvc 127.0.0.1:50061
  quire gateway --port 50052 --gateway-id gateway-2 --max-queue-size 4096
  quire gateway --api-server-count 4
"""


def main() -> int:
    """Runs the gateway and returns the exit code."""
    try:
        config, sources = load(GatewayConfig, "gateway", sys.argv[1:], os.environ, epilog=EXAMPLES)
    except QuireError as error:
        sys.stderr.write(f"quire gateway: {error.message}\n")
        return 2
    configure_logging(config.log_level, config.log_format, service="gateway")
    try:
        if config.api_server_count > 1:
            from gateway.fronts.supervisor import supervise  # noqa: PLC0415 - not needed for a bad flag

            return asyncio.run(supervise(config, sys.argv[1:]))
        if config.in_process:
            from gateway.in_process import serve_in_process  # noqa: PLC0415 - torch comes with it

            return asyncio.run(serve_in_process(config, sources))
        from gateway.server import serve  # noqa: PLC0415 - not needed for a bad flag

        return asyncio.run(serve(config, sources))
    except QuireError as error:
        sys.stderr.write(f"quire gateway: {error.message}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
