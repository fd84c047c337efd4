"""A service to supervise: serves health as the real ones do, and misbehaves as it is told.

python supervised_service.py NAME PORT JOURNAL [BEHAVIOUR]
"""

import asyncio
from pathlib import Path
import signal
import sys
import time

from quire.config import ServiceConfig
from quire.logging import configure_logging
from quire.service_host import ServiceHost


def note(journal: str, text: str) -> None:
    """Appends a line to the journal that all services of a test share."""
    with Path(journal).open("a") as file:
        file.write(text + "\n")


async def serve(name: str, port: int, journal: str, behaviour: str) -> None:
    """Serves until told to stop."""
    host = ServiceHost(ServiceConfig(port=port), ())
    await host.start()
    note(journal, f"{name} started")
    if behaviour != "never-healthy":
        await host.set_serving(serving=True)
    if behaviour == "crash-later":
        await asyncio.sleep(0.3)
        sys.stderr.write("RuntimeError: the device is gone\n")
        sys.stderr.flush()
        signal.raise_signal(signal.SIGKILL)
    await host.wait_for_stop()
    await host.stop()
    note(journal, f"{name} stopped")


def main() -> int:
    """Runs the service and returns its exit status."""
    name, port, journal, *rest = sys.argv[1:]
    behaviour = rest[0] if rest else ""
    configure_logging("info", "json", service=name)
    if behaviour == "bad-setting":
        sys.stderr.write(f"quire {name}: --store: 'x' is not a store\n")
        return 2
    if behaviour == "bad-model":
        sys.stderr.write(f"quire {name}: no model at /nowhere\n")
        return 1
    if behaviour == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        note(journal, f"{name} started")
        while True:
            time.sleep(1)
    asyncio.run(serve(name, int(port), journal, behaviour))
    return 0


if __name__ == "__main__":
    sys.exit(main())
