"""Wiring and life cycle of the executor process."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
import sys
from typing import Final

import structlog

from execsvc import device_failure, events
from execsvc.config import ExecsvcConfig
from execsvc.executor import Executor
from execsvc.loading import LoadedModel
from execsvc.loading import load as load_model
from execsvc.registration import Registration
from execsvc.service import SERVICE_NAME, ExecutorServicer
from protos.execsvc.v1 import execsvc_pb2_grpc
from quire import config as settings
from quire.errors import ConfigError, QuireError
from quire.logging import configure_logging
from quire.service_host import ServiceHost

log = structlog.get_logger(__name__)

_EXAMPLES: Final = """examples:
  quire execsvc                                     the packaged SmolLM2 on port 50071
  quire execsvc --model ./Llama-3.2-1B --dtype bfloat16 --kv-cache-bytes 4GiB
  quire execsvc --executor-id executor-1 --port 50072 --memsvc 10.0.0.5:50061 --advertise 10.0.0.7:50072

Every flag is also a variable, for example QUIRE_EXECSVC_KV_CACHE_BYTES=4GiB.
"""
_DEVICE_ADVICE: Final = {
    device_failure.OUT_OF_MEMORY: "lower --gpu-memory-utilization or --max-num-batched-tokens",
    device_failure.DEVICE_ERROR: "look for Xid lines in the system's log; the next start gets a fresh device context",
}
_DRAIN_POLL_SECONDS: Final = 0.05


class Server:
    """One executor process: listens at once, loads, registers, serves, drains."""

    def __init__(self, config: ExecsvcConfig) -> None:
        """Prepares; nothing is opened yet. Call from the event loop."""
        self._config = config
        self._failure: BaseException | None = None
        self._host = ServiceHost(config, (SERVICE_NAME,))
        self.executor = Executor(config, self._fail)
        execsvc_pb2_grpc.add_ExecutorServiceServicer_to_server(ExecutorServicer(self.executor), self._host.server)

    def _fail(self, error: BaseException) -> None:
        """Stops the process because of `error`. The first cause stays."""
        if self._failure is None:
            self._failure = error
            # One line for what a person can put right, the stack for a defect.
            kind = device_failure.kind_of(error)
            if kind is not None:
                log.error(
                    events.DEVICE_FAILED, error=device_failure.first_line(error), kind=kind,
                    executor_incarnation=self.executor.incarnation, advice=_DEVICE_ADVICE[kind],
                )  # fmt: skip
            else:
                details = {"reason": error.reason} if isinstance(error, QuireError) else {"exc_info": error}
                log.error(events.SERVICE_FAILED, error=str(error), **details)
        self._host.request_stop("failed")

    async def run(self) -> None:
        """Runs until a stop is requested.

        Raises:
            QuireError: the model cannot be loaded, the port is taken, or a newer incarnation took over.
            Exception: a defect, or a broken device.
        """
        address = await self._host.start()
        work = asyncio.create_task(self._load_and_register(address), name="load-and-register")
        try:
            await self._host.wait_for_stop()
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            await self._host.stop(self._drain if self._failure is None else None)
            await self.executor.close()
        if self._failure is not None:
            raise self._failure

    async def _load_and_register(self, address: str) -> None:
        """Loads the model, then stays registered. What goes wrong stops the process."""
        try:
            loaded = await self._load()
            self.executor.become_ready(loaded)
            advertised = self._config.advertise or address
            await Registration(self.executor, self._config.memsvc, advertised, self._serve).run()
        except Exception as error:  # noqa: BLE001 - the task's end: it is logged and ends the process
            self._fail(error)

    async def _load(self) -> LoadedModel:
        """Loads the model in a thread."""

        def progress(share: float) -> None:
            self.executor.load_progress = share

        return await asyncio.to_thread(load_model, self._config, progress)

    async def _serve(self) -> None:
        """Says SERVING: the pool is registered."""
        await self._host.set_serving(serving=True)

    async def _drain(self) -> None:
        """Waits until gateways have closed their sequences."""
        while await self.executor.open_tables():  # noqa: ASYNC110 - gateways finish in their own time
            await asyncio.sleep(_DRAIN_POLL_SECONDS)


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Runs the executor; returns the exit code.

    0 stopped, 1 failure, 2 bad settings, 3 the device failed, 130 interrupted.
    """
    try:
        config, sources = settings.load(ExecsvcConfig, "execsvc", argv, environ, epilog=_EXAMPLES)
        _ = config.kv_cache_size, config.swap_byte_count
    except ConfigError as error:
        sys.stderr.write(f"quire execsvc: {error.message}\n")
        return 2
    configure_logging(config.log_level, config.log_format, service="execsvc")
    log.info(events.CONFIG_LOADED, **settings.describe(config, sources))
    try:
        asyncio.run(_run(config))
    except ConfigError as error:
        sys.stderr.write(f"quire execsvc: {error.message}\n")
        return 2
    except QuireError as error:
        sys.stderr.write(f"quire execsvc: {error.message}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if device_failure.kind_of(error) is None:
            raise
        sys.stderr.write(f"quire execsvc: the device failed: {device_failure.first_line(error)}\n")
        return device_failure.EXIT_DEVICE
    return 0


async def _run(config: ExecsvcConfig) -> None:
    """Runs a server on the current event loop."""
    await Server(config).run()
