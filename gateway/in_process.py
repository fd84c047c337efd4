"""One process for all: the memory core and the executor inside the gateway, with no hop between them.

The only place where a service imports another. The executor's settings are its own: QUIRE_EXECSVC_* variables.
"""

from __future__ import annotations

from collections.abc import Mapping
import hashlib
import os

import structlog

from execsvc.config import ExecsvcConfig
from execsvc.local import LocalExecutor
from gateway.config import GatewayConfig
from gateway.server import complete, run
from gateway.tokenize import TokenizerFiles
from memsvc.local import LocalMemory
from protos.execsvc.v1 import execsvc_pb2 as pb
from quire.config import describe, load
from quire.memory import PoolSpec

log = structlog.get_logger(__name__)


class InProcessLink:
    """`gateway.clients.executor.ExecutorLink` on the executor in this process, which outlives the lane's sessions."""

    def __init__(self, executor: LocalExecutor) -> None:
        self._executor = executor

    async def describe(self) -> pb.DescribeResponse:
        """See ExecutorLink."""
        return await self._executor.describe()

    async def tokenizer(self) -> TokenizerFiles:
        """See ExecutorLink."""
        chat_template, bos_token, eos_token, tokenizer_json = await self._executor.tokenizer()
        data = tokenizer_json.encode()
        return TokenizerFiles(data, hashlib.sha256(data).digest(), chat_template, bos_token, eos_token)

    async def open(self, request: pb.Open) -> pb.Opened:
        """See ExecutorLink: an earlier session ends first."""
        return await self._executor.open(request)

    async def run(self, plan: pb.StepPlan) -> pb.StepResult:
        """See ExecutorLink."""
        return await self._executor.run(plan)

    async def close(self) -> None:
        """See ExecutorLink: the next `open` ends the session, `LocalExecutor.close` the executor."""


async def serve_in_process(config: GatewayConfig, sources: Mapping[str, str], engine_address: str = "") -> int:
    """Loads the model, then serves until told to stop, at `engine_address` if there are fronts; returns the exit code.

    Raises:
        ConfigError: a setting of the executor is wrong, or the address cannot be bound.
        ModelFormatError: the model cannot be loaded.
    """
    config = complete(config)
    log.info("config_loaded", **describe(config, sources))
    executor_config, executor_sources = load(ExecsvcConfig, "execsvc", [], os.environ)
    log.info("config_loaded", **describe(executor_config, executor_sources))
    defects: list[BaseException] = []
    executor = LocalExecutor(executor_config, defects.append)
    try:
        await executor.start()
        description = await executor.describe()
        pool = description.pool
        spec = PoolSpec(
            block_count=pool.block_count,
            block_size=pool.block_size,
            bytes_per_block=pool.bytes_per_block,
            model_id=pool.model_id,
            kv_dtype=pool.kv_dtype,
            max_model_len=pool.max_model_len,
            sliding_window=pool.sliding_window,
        )
        memory = LocalMemory(gateway_id=config.gateway_id)
        incarnation = description.executor_incarnation
        epoch = memory.register_pool(executor_config.executor_id, incarnation, "in-process:0", spec)
        await executor.begin_epoch(epoch)
        link = InProcessLink(executor)
        code = await run(config, memory, lambda _address: link, engine_address)
    finally:
        await executor.close()
    return 1 if defects else code
