"""The pools of a memory service, looked at while a load runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
import dataclasses
from typing import Any

import grpc

from protos.memsvc.v1 import admin_pb2 as pb
from protos.memsvc.v1 import admin_pb2_grpc
from quire.client import as_quire_error
from quire.rpc import open_channel

_SECONDS = 5.0


@dataclasses.dataclass(frozen=True, slots=True)
class PoolSample:
    """All pools of a memory service together, at one time."""

    at: float
    """Seconds since the load began."""
    utilization: float
    """Tokens in used blocks by all token slots."""
    used_block_count: int
    cached_block_count: int
    sequence_count: int


class PoolWatch:
    """Samples the pools at an address, some times a second.

    Args:
        address: of the memory service, host:port.
        interval: seconds between samples.
    """

    def __init__(self, address: str, interval: float = 0.25) -> None:
        self._address = address
        self._channel = open_channel(address)
        self._stub: Any = admin_pb2_grpc.AdminServiceStub(self._channel)
        self._interval = interval
        self.samples: list[PoolSample] = []

    async def look(self, at: float) -> PoolSample:
        """Returns the pools as they are; raises QuireError."""
        try:
            answer = await self._stub.ListPools(pb.ListPoolsRequest(), timeout=_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise as_quire_error(error, self._address) from error
        pools = answer.pools
        slots = sum((pool.spec.block_count - 1) * pool.spec.block_size for pool in pools)
        tokens = sum(pool.used_token_count for pool in pools)
        return PoolSample(
            at,
            tokens / slots if slots else 0.0,
            sum(pool.used_block_count for pool in pools),
            sum(pool.cached_block_count for pool in pools),
            sum(pool.sequence_count for pool in pools),
        )

    async def run(self, clock: Callable[[], float]) -> None:
        """Keeps sampling until it is cancelled; raises QuireError when the service is gone."""
        while True:
            self.samples.append(await self.look(clock()))
            await asyncio.sleep(self._interval)

    async def close(self) -> None:
        """Disconnects."""
        await self._channel.close()
