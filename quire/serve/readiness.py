"""Asks services how far they are: health, and the executor's share of loaded weights."""

from __future__ import annotations

import dataclasses

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.execsvc.v1 import execsvc_pb2, execsvc_pb2_grpc
from quire.rpc import open_channel

_CALL_SECONDS = 2.0


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """How far a service is."""

    ready: bool
    phase: str
    """For people, for example "loading weights"."""
    share: float | None = None
    """Part of the phase that is done, 0 .. 1, if it is known."""


class Probe:
    """A connection that watches one service become ready."""

    def __init__(self, service: str, address: str) -> None:
        """Prepares to ask `service` at `address`."""
        self._service = service
        self._channel = open_channel(address)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self._executor = execsvc_pb2_grpc.ExecutorServiceStub(self._channel)

    async def ask(self) -> Progress:
        """Returns how far the service is."""
        try:
            answer = await self._health.Check(health_pb2.HealthCheckRequest(), timeout=_CALL_SECONDS)
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return Progress(ready=True, phase="ready")
            return await self._waiting()
        except grpc.RpcError:
            return Progress(ready=False, phase="starting")

    async def _waiting(self) -> Progress:
        """Returns what a service that listens and does not serve yet is waiting for."""
        if self._service != "execsvc":
            waits_for = "waiting for an executor" if self._service == "gateway" else "starting"
            return Progress(ready=False, phase=waits_for)
        answer = await self._executor.Describe(execsvc_pb2.DescribeRequest(), timeout=_CALL_SECONDS)
        if answer.load_progress < 1:
            return Progress(ready=False, phase="loading weights", share=answer.load_progress)
        if not answer.epoch:
            return Progress(ready=False, phase="registering its pool with memsvc")
        return Progress(ready=False, phase="warming up")

    async def close(self) -> None:
        """Closes the connection."""
        await self._channel.close()
