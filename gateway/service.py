"""GenerationService: messages to calls and back."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc

from gateway.tenants import tenant_of
from gateway.validation import check_for, check_request_id, encode_prompt
from protos.gateway.v1 import gateway_pb2 as pb
from protos.gateway.v1 import gateway_pb2_grpc
from quire.errors import InvalidRequestError

if TYPE_CHECKING:
    from gateway.config import GatewayConfig
    from gateway.intake import Intake
    from gateway.streams import RequestStream

_MAX_CANCELS = 1_000

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class GenerationService(gateway_pb2_grpc.GenerationServiceServicer):
    """The public API on an engine."""

    def __init__(self, engine: Intake, config: GatewayConfig) -> None:
        self._engine = engine
        self._config = config

    async def _submit(self, spec: pb.GenerationSpec, context: Context) -> RequestStream:
        """Checks and queues a request; raises QuireError."""
        model = self._engine.find_model(spec.model)
        # Before the prompt is looked at: a flood must not cost a tokenisation for each refusal.
        self._engine.check_request(check_request_id(spec.request_id), model.name)
        settings = await check_for(self._config, spec, model)
        if self._config.tenant_metadata:
            settings = dataclasses.replace(settings, tenant=tenant_of(context, self._config.tenant_metadata))
        return self._engine.submit(settings)

    async def GenerateStream(self, request: pb.GenerateStreamRequest, context: Context) -> None:  # type: ignore[override]
        """Streams a completion: writes, where generators inside each other would take their share of every message."""
        stream = await self._submit(request.spec, context)
        write = context.write
        try:
            while messages := await stream.take():
                for message in messages:
                    await write(message)
        finally:
            # Reached on every ending: the end, an error, a cancelled call, a deadline, a client that is gone.
            self._engine.abandon(stream)

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        """Returns a whole completion."""
        stream = await self._submit(request.spec, context)
        count = stream.settings.answer_count or stream.settings.sample_count
        completions = [pb.Completion(index=index) for index in range(count)]
        texts: list[list[str]] = [[] for _ in range(count)]
        response = pb.GenerateResponse(request_id=stream.settings.request_id)
        try:
            async for event in stream.events():
                for sample in event.delta.samples:
                    texts[sample.index].append(sample.text)
                    completions[sample.index].token_ids.extend(sample.token_ids)
                    completions[sample.index].logprobs.extend(sample.logprobs)
                    if sample.HasField("ending"):
                        completions[sample.index].ending.CopyFrom(sample.ending)
                if event.HasField("prompt_logprobs"):
                    response.prompt_logprobs.CopyFrom(event.prompt_logprobs)
                if event.HasField("finished"):
                    response.usage.CopyFrom(event.finished.usage)
        finally:
            self._engine.abandon(stream)
        for completion, parts in zip(completions, texts, strict=True):
            completion.text = "".join(parts)
        response.completions.extend(completions)
        return response

    async def CancelRequests(self, request: pb.CancelRequestsRequest, context: Context) -> pb.CancelRequestsResponse:
        """Cancels requests and answers when their blocks are on their way back to the pool."""
        count = len(request.request_ids)
        if not 1 <= count <= _MAX_CANCELS:
            message = f"request_ids: found {count} ids, allowed are 1 .. {_MAX_CANCELS}"
            raise InvalidRequestError(message, field="request_ids")
        ids = list(dict.fromkeys(request.request_ids))
        tenant = tenant_of(context, self._config.tenant_metadata)
        live = await self._engine.cancel_all(ids, tenant)
        return pb.CancelRequestsResponse(
            cancelled_request_ids=[request_id for request_id in ids if request_id in live],
            unknown_request_ids=[request_id for request_id in ids if request_id not in live],
        )

    async def CountTokens(self, request: pb.CountTokensRequest, context: Context) -> pb.CountTokensResponse:
        """Counts the tokens of a prompt."""
        tokens = await encode_prompt(request, self._engine.find_model(request.model))
        return pb.CountTokensResponse(token_count=len(tokens), token_ids=tokens)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """Lists the models."""
        return pb.ListModelsResponse(models=[model.described() for model in self._engine.models()])
