"""A memory service in a process of its own, on loopback, for as long as it is measured."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys

from memsvc.translate import from_spec
from protos.memsvc.v1 import memsvc_pb2, memsvc_pb2_grpc
from quire.errors import MemoryUnavailableError
from quire.memory import PoolSpec
from quire.rpc import open_channel

_START_SECONDS = 30.0
_STOP_SECONDS = 10.0


class MemsvcProcess:
    """`python -m memsvc` on a free port, with one pool that needs no heartbeat."""

    def __init__(self) -> None:
        """Starts nothing yet."""
        self._process: asyncio.subprocess.Process | None = None
        self._log: asyncio.Task[None] | None = None
        self.address = ""

    async def start(self) -> None:
        """Starts the service and waits until it serves.

        Raises:
            MemoryUnavailableError: it ended, or does not come up in time.
        """
        flags = ["--port", "0", "--log-format", "json", "--log-level", "info", "--parent-pid", str(os.getpid())]
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "memsvc", *flags, "--lease-ttl", "3600", "--check-interval", "0"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            # What the caller's environment sets for memsvc is not what is measured.
            env={name: value for name, value in os.environ.items() if not name.startswith("QUIRE_MEMSVC_")},
        )
        try:
            self.address = await asyncio.wait_for(self._read_address(), _START_SECONDS)
        except TimeoutError:
            await self.close()
            raise MemoryUnavailableError(f"memsvc did not serve within {_START_SECONDS:g} s") from None
        self._log = asyncio.create_task(self._drain(), name="memsvc-log")

    async def register_pool(self, pool_id: str, spec: PoolSpec) -> None:
        """Registers the pool of an executor that nobody will ever call."""
        async with open_channel(self.address) as channel:
            request = memsvc_pb2.RegisterPoolRequest(
                executor_id=pool_id, executor_incarnation=1, address="127.0.0.1:1", spec=from_spec(spec)
            )
            await memsvc_pb2_grpc.MemoryServiceStub(channel).RegisterPool(request, timeout=_START_SECONDS)

    async def close(self) -> None:
        """Stops the service."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await asyncio.wait_for(process.wait(), _STOP_SECONDS)
        if self._log is not None:
            await self._log

    async def _read_address(self) -> str:
        """Reads the log until the service says where it listens."""
        assert self._process is not None
        assert self._process.stderr is not None
        last = b""
        async for line in self._process.stderr:
            last = line
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if event.get("event") == "service_started":
                    return str(event["address"])
        raise MemoryUnavailableError(f"memsvc ended before it served: {last.decode(errors='replace').strip()}")

    async def _drain(self) -> None:
        """Reads the rest of the log, so that the service never waits for us."""
        assert self._process is not None
        assert self._process.stderr is not None
        async for _ in self._process.stderr:
            pass
