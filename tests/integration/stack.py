"""Starts the real services as processes on free ports, and stops them."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import dataclasses
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time
from typing import Any

import grpc

from protos.memsvc.v1 import admin_pb2, admin_pb2_grpc
from quire.healthcheck import check

START_SECONDS = 90.0
STOP_SECONDS = 40.0
POOL_ID = "executor-test"


@dataclasses.dataclass
class Service:
    """One running process."""

    name: str
    process: subprocess.Popen[bytes]
    log_path: Path
    address: str = ""

    def wait_listening(self) -> None:
        """Waits for the `service_listening` event and keeps its address."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            for event in self.events("service_listening"):
                self.address = event["address"]
                return
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.name} exited with {self.process.returncode}:\n{self.log_path.read_text()}")
            time.sleep(0.05)
        raise RuntimeError(f"{self.name} does not listen:\n{self.log_path.read_text()}")

    def wait_serving(self) -> None:
        """Waits until the service is healthy."""
        deadline = time.monotonic() + START_SECONDS
        while check(self.address) != "SERVING":
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError(f"{self.name} is not healthy:\n{self.log_path.read_text()}")
            time.sleep(0.1)

    def events(self, name: str) -> list[dict[str, object]]:
        """Returns the logged events of this name."""
        lines = [line for line in self.log_path.read_text().splitlines() if line.startswith("{")]
        return [event for event in map(json.loads, lines) if event.get("event") == name]

    def stop(self) -> int:
        """Sends SIGTERM and returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


@dataclasses.dataclass
class Stack:
    """memsvc, execsvc and gateway on loopback."""

    memsvc: Service
    execsvc: Service
    gateway: Service

    @property
    def address(self) -> str:
        """The gateway's address."""
        return self.gateway.address

    @contextlib.contextmanager
    def admin(self) -> Iterator[admin_pb2_grpc.AdminServiceStub]:
        """Yields a stub of memsvc's AdminService."""
        with grpc.insecure_channel(self.memsvc.address) as channel:
            yield admin_pb2_grpc.AdminServiceStub(channel)

    def pool(self) -> admin_pb2.Pool:
        """Returns the pool as it is now."""
        with self.admin() as admin:
            return admin.GetPool(admin_pb2.GetPoolRequest(pool_id=POOL_ID), timeout=5).pool

    def wait_idle(self, seconds: float = 5.0) -> admin_pb2.Pool:
        """Waits until no sequence, lease or fence holds a block, and returns the pool; its counts must add up."""
        deadline = time.monotonic() + seconds
        while True:
            pool = self.pool()
            held = pool.used_block_count + pool.leased_block_count + pool.pending_free_block_count
            assert held + pool.cached_block_count + pool.free_block_count == pool.spec.block_count - 1
            if held == 0 and pool.sequence_count == 0:
                return pool
            assert time.monotonic() < deadline, f"blocks are still held: {pool}"
            time.sleep(0.02)


def start_service(
    name: str,
    directory: Path,
    *flags: str,
    port: str = "0",
    settings: dict[str, str] | None = None,
    program: Path | None = None,
) -> Service:
    """Starts `python -m NAME FLAGS`, or a program, by default on a free port, logging JSON to a file."""
    log_path = directory / f"{name}-{time.monotonic_ns()}.log"
    environ = {key: value for key, value in os.environ.items() if not key.startswith("QUIRE_")}
    environ |= settings or {}
    shared = ("--port", port, "--log-format", "json", "--parent-pid", str(os.getpid()))
    run = ("-m", name) if program is None else (str(program),)
    command = [sys.executable, *run, *shared, *flags]
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environ, cwd=directory)
    return Service(name, process, log_path)


@contextlib.contextmanager
def running_stack(
    directory: Path,
    *,
    model: str = "smollm2",
    memsvc: tuple[str, ...] = (),
    execsvc: tuple[str, ...] = (),
    gateway: tuple[str, ...] = (),
    failing: dict[str, Any] | None = None,
) -> Iterator[Stack]:
    """Yields a healthy stack; stops it afterwards, the gateway first.

    With `failing`, what `start_service` takes besides, the executor is another program.
    """
    with contextlib.ExitStack() as cleanup:
        memory_service = start_service("memsvc", directory, *memsvc)
        cleanup.callback(memory_service.stop)
        memory_service.wait_listening()
        executor_flags = ("--model", model, "--memsvc", memory_service.address, "--executor-id", POOL_ID, *execsvc)
        executor = start_service("execsvc", directory, *executor_flags, **(failing or {}))
        cleanup.callback(executor.stop)
        executor.wait_listening()
        front = start_service("gateway", directory, "--memsvc", memory_service.address, *gateway)
        cleanup.callback(front.stop)
        front.wait_listening()
        for service in (memory_service, executor, front):
            service.wait_serving()
        yield Stack(memory_service, executor, front)
