"""Wiring and life cycle of the memory service."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import structlog

from memsvc.admin import AdminServicer
from memsvc.config import MemsvcConfig
from memsvc.core.memory import MemoryCore
from memsvc.keeper import Keeper
from memsvc.quota_file import read_quotas
from memsvc.recorder import LogRecorder
from memsvc.service import MemoryServicer
from memsvc.sharing.locate import Locator
from memsvc.sharing.tail import Tail
from memsvc.store import open_store
from protos.memsvc.v1 import admin_pb2_grpc, memsvc_pb2_grpc
from quire import native
from quire.config import describe
from quire.service_host import ServiceHost

_REFRESHES_PER_TTL = 3

log = structlog.get_logger(__name__)

SERVICE_NAMES = ("quire.memsvc.v1.MemoryService", "quire.memsvc.v1.AdminService")


class MemsvcServer:
    """A running memory service.

    Args:
        config: settings.
        host: the outside; another one only in tests.

    Raises:
        ConfigError: settings that do not fit.
    """

    def __init__(self, config: MemsvcConfig, host: ServiceHost | None = None) -> None:
        config.check()
        secret = config.tenant_secret()
        # Nobody else can look into the embedded store: there is no one to write for.
        shared = config.store != "memory://"
        core = MemoryCore(
            secret,
            lease_ttl=config.lease_ttl,
            block_count_limit=config.max_pool_blocks,
            pool_limit=config.max_pools,
            cache_events=shared,
            forecast=config.admission_forecast,
            quotas=read_quotas(config.quota_file) if config.quota_file is not None else {},
            retained_share=config.retained_share,
            residency_every=config.residency_every,
        )
        self._store = open_store(config.store, config.store_credentials())
        self.tail = (
            Tail(core, self._store, lease_ttl=config.lease_ttl, queue_limit=config.store_queue_blocks)
            if shared
            else None
        )
        self.locator = Locator(core, self._store, secret, refresh_interval=config.lease_ttl / _REFRESHES_PER_TTL)
        self.host = host if host is not None else ServiceHost(config, SERVICE_NAMES)
        self.failed = False
        changed = self.tail.notify if self.tail is not None else lambda: None
        self.keeper = Keeper(config, core, self._store, self._fail, changed=changed)
        self.recorder: LogRecorder | None = None
        if config.log_dir is not None and self.keeper.log is not None:
            self.recorder = LogRecorder(
                self.keeper.log, core, Path(config.log_dir), config.memsvc_id, config.log_dir_mib << 20
            )
        if shared and config.tenant_secret_file is None:
            log.info("tenant_secret_drawn", effect="no other memory service finds the prefixes of this one")

    async def start(self) -> str:
        """Listens, serves, and returns "host:port"; raises ConfigError if it cannot listen."""
        memsvc_pb2_grpc.add_MemoryServiceServicer_to_server(MemoryServicer(self.keeper, self.locator), self.host.server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(AdminServicer(self.keeper), self.host.server)
        address = await self.host.start()
        await self._store.start()
        service = await self.keeper.start(address)
        self.locator.start(service)
        if self.tail is not None:
            self.tail.start(service)
        if self.recorder is not None:
            self.recorder.start()
        await self.host.set_serving(serving=True)
        return address

    async def stop(self) -> None:
        """Stops serving. Gateways go on with their leases and executors with their steps; both find a new start."""
        await self.host.stop()
        if self.tail is not None:
            await self.tail.close()
        await self.keeper.close()
        if self.recorder is not None:
            await self.recorder.close()
        await self._store.close()

    def _fail(self, reason: str) -> None:
        """Has the process stop: its state cannot be trusted, and is rebuilt by a new start."""
        self.failed = True
        self.host.request_stop(reason)


async def serve(config: MemsvcConfig, sources: Mapping[str, str]) -> int:
    """Runs the service until it is told to stop and returns the exit status.

    Raises:
        ConfigError: settings that do not fit, or an address that cannot be bound.
    """
    log.info("config_loaded", **describe(config, sources))
    server = MemsvcServer(config)
    address = await server.start()
    log.info("service_started", address=address)
    if native.accelerator is not None:
        log.info("accelerator_found", effect="the memory core hashes and applies journals in C")
    else:
        log.info(
            "accelerator_missing", reason=native.reason, effect="the memory core runs in Python, several times slower"
        )
    reason = await server.host.wait_for_stop()
    await server.stop()
    if server.failed:
        return 1
    return 130 if reason == "SIGINT" else 0
