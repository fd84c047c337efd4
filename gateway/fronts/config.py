"""Settings of the processes that a gateway with several fronts starts: those of the gateway, and how they meet."""

from __future__ import annotations

import dataclasses

from gateway.config import GatewayConfig
from quire.config import setting


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerConfig(GatewayConfig):
    """One process of a gateway."""

    engine_address: str = setting("", "Where the engine listens for its fronts: unix:PATH.")
    worker: str = setting("", "Name of the process in the log.")
