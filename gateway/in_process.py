"""One process for all: the memory core and the executor inside the gateway, with no hop between them.

The only place where a service imports another. The executor's settings are its own: QUIRE_EXECSVC_* variables.
"""

from __future__ import annotations

from collections.abc import Mapping
import os

import structlog

from execsvc.config import ExecsvcConfig
from execsvc.local import LocalExecutor
from gateway.config import GatewayConfig
from gateway.server import complete, run
from memsvc.local import LocalMemory
from quire.config import describe, load

log = structlog.get_logger(__name__)


async def serve_in_process(config: GatewayConfig, sources: Mapping[str, str]) -> int:
    """Loads the model, then serves until told to stop; returns the exit code.

    Raises:
        ConfigError: a setting of the executor is wrong, or the address cannot be bound.
        ModelFormatError: the model cannot be loaded.
    """
    config = complete(config)
    log.info("config_loaded", **describe(config, sources))
    executor_config, executor_sources = load(ExecsvcConfig, "execsvc", [], os.environ)
    log.info("config_loaded", **describe(executor_config, executor_sources))
    executor = await LocalExecutor.load(executor_config)
    memory = LocalMemory()
    memory.register(executor.pool_info())
    try:
        return await run(config, memory, lambda _address: executor)
    finally:
        await executor.shut_down()
