"""A memory service in a process of its own, on loopback, for as long as it is measured."""

from __future__ import annotations

from gateway.bench.service_process import ServiceProcess
from memsvc.translate import from_spec
from protos.memsvc.v1 import memsvc_pb2, memsvc_pb2_grpc
from quire.memory import PoolSpec
from quire.rpc import open_channel

_REGISTER_SECONDS = 30.0
NOBODY = "127.0.0.1:1"
"""The address of an executor that nobody will ever call."""


class MemsvcProcess(ServiceProcess):
    """`python -m memsvc` on a free port, with one pool that needs no heartbeat."""

    def __init__(self) -> None:
        """Starts nothing yet."""
        flags = ("--lease-ttl", "3600", "--check-interval", "0")
        super().__init__("memsvc", flags, event="service_started", own_settings="QUIRE_MEMSVC_")

    async def register_pool(self, pool_id: str, spec: PoolSpec, address: str = NOBODY) -> None:
        """Registers the pool of an executor that listens at `address`."""
        async with open_channel(self.address) as channel:
            request = memsvc_pb2.RegisterPoolRequest(
                executor_id=pool_id, executor_incarnation=1, address=address, spec=from_spec(spec)
            )
            await memsvc_pb2_grpc.MemoryServiceStub(channel).RegisterPool(request, timeout=_REGISTER_SECONDS)
