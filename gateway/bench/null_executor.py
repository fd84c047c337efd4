"""`python -m gateway.bench.null_executor`: an executor without a model, for measuring what is around it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any, TypeAlias

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gateway.bench.scheduling import NullDevice
from gateway.bench.service_process import run_service
from protos.execsvc.v1 import execsvc_pb2 as pb
from protos.execsvc.v1 import execsvc_pb2_grpc
from quire.config import ServiceConfig, setting

if TYPE_CHECKING:
    import grpc

MODEL = "null"
MAX_MODEL_LEN = 131_072
VOCAB_SIZE = 256
_BUDGET = 1 << 20
_SERVICE = pb.DESCRIPTOR.services_by_name["ExecutorService"].full_name

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


@dataclasses.dataclass(frozen=True, slots=True)
class NullExecutorConfig(ServiceConfig):
    """An executor without a model: every step samples the same token for every sequence."""

    step_seconds: float = setting(0.0, "Seconds that a step takes.", minimum=0)
    max_num_seqs: int = setting(256, "Most sequences.", minimum=1)


class NullExecutor(execsvc_pb2_grpc.ExecutorServiceServicer):
    """The RPCs of an executor that a gateway calls."""

    def __init__(self, config: NullExecutorConfig) -> None:
        """Answers with what `config` says."""
        self._config = config

    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeResponse:
        """Says what runs here."""
        model = pb.ModelInfo(name=MODEL, architecture="Null", vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN)
        return pb.DescribeResponse(
            executor_id="bench",
            executor_incarnation=1,
            ready=True,
            load_progress=1.0,
            model=model,
            max_num_batched_tokens=_BUDGET,
            max_num_seqs=self._config.max_num_seqs,
        )

    async def GetTokenizer(
        self, request: pb.GetTokenizerRequest, context: Context
    ) -> AsyncIterator[pb.GetTokenizerResponse]:
        """Streams a byte-level tokenizer without merges: a token for each of the 256 bytes."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        model = models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[])
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        data = tokenizer.to_str().encode()
        yield pb.GetTokenizerResponse(sha256=hashlib.sha256(data).digest())
        yield pb.GetTokenizerResponse(chunk=data)

    async def Run(
        self, request_iterator: AsyncIterator[pb.RunRequest], context: Context
    ) -> AsyncIterator[pb.RunResponse]:
        """Runs steps, one after the other, as a device does."""
        device = NullDevice()
        async for request in request_iterator:
            if request.WhichOneof("message") == "open":
                yield pb.RunResponse(opened=pb.Opened(epoch=request.open.epoch))
                continue
            if self._config.step_seconds:
                await asyncio.sleep(self._config.step_seconds)
            yield pb.RunResponse(result=device.run(request.plan))

    async def Fence(self, request: pb.FenceRequest, context: Context) -> pb.FenceResponse:
        """Answers at once: nothing is ever written."""
        return pb.FenceResponse(epoch=request.epoch_floor)


def _add(config: NullExecutorConfig, server: grpc.aio.Server) -> None:
    execsvc_pb2_grpc.add_ExecutorServiceServicer_to_server(NullExecutor(config), server)


if __name__ == "__main__":
    run_service(NullExecutorConfig, "null_executor", _SERVICE, _add)
