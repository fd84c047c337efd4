"""The session with an executor: when it ends, everybody who waits for it is told so."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from gateway.bench.null_executor import NullExecutor, NullExecutorConfig
from gateway.clients.executor import RemoteExecutor
from protos.execsvc.v1 import execsvc_pb2 as pb
from protos.execsvc.v1 import execsvc_pb2_grpc
from quire.errors import ExecutorUnavailableError
from quire.rpc import SERVER_OPTIONS


async def test_a_step_that_waits_to_be_sent_when_the_session_ends_is_lost_with_it() -> None:
    """Anything but this error counts as a defect of the gateway, which then stops, with all its clients."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    execsvc_pb2_grpc.add_ExecutorServiceServicer_to_server(NullExecutor(NullExecutorConfig()), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    link = RemoteExecutor(f"127.0.0.1:{port}")
    async with asyncio.timeout(20):
        await link.open(pb.Open(gateway_id="g", epoch=1))
        # As while the step before is being written.
        async with link._write_lock:
            step = asyncio.create_task(link.run(pb.StepPlan(step=1, epoch=1)))
            await asyncio.sleep(0)
            await server.stop(0)
            while link._call is not None:
                await asyncio.sleep(0.01)
        with pytest.raises(ExecutorUnavailableError, match="is over"):
            await step
        await link.close()
