"""Endpoints that can be loaded: Quire's own protocol, and servers with OpenAI's completions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
import contextlib
import http.client
import json
from typing import Any, Protocol
import urllib.parse

import grpc

from gateway.bench.serve.record import Record
from protos.gateway.v1 import gateway_pb2 as pb
from protos.gateway.v1 import gateway_pb2_grpc
from quire import status
from quire.client import as_quire_error
from quire.errors import ConfigError
from quire.rpc import open_channel

_ABOUT_SECONDS = 10.0
_OK = 200


class Backend(Protocol):
    """An endpoint. `model`, `vocab_size` and `max_model_len` are known once it is open."""

    model: str
    vocab_size: int
    max_model_len: int
    """Tokens of the longest sequence; 0 if the endpoint does not say."""

    async def open(self) -> None:
        """Connects and asks what is served; raises QuireError."""
        ...

    async def generate(self, record: Record, prompt: list[int], max_tokens: int, clock: Callable[[], float]) -> None:
        """Sends one request and fills in its record, its failure included.

        Args:
            record: of this request.
            prompt: token ids.
            max_tokens: tokens to generate, no fewer.
            clock: seconds since the load began.
        """
        ...

    async def close(self) -> None:
        """Disconnects."""
        ...


class QuireBackend:
    """A gateway of Quire at host:port."""

    def __init__(self, address: str, model: str, *, ignore_eos: bool) -> None:
        self._address = address
        self._channel = open_channel(address)
        self._stub: Any = gateway_pb2_grpc.GenerationServiceStub(self._channel)
        self._ignore_eos = ignore_eos
        self.model = model
        self.vocab_size = 0
        self.max_model_len = 0

    async def open(self) -> None:
        """See Backend."""
        try:
            answer = await self._stub.ListModels(pb.ListModelsRequest(), timeout=_ABOUT_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise as_quire_error(error, self._address) from error
        for model in answer.models:
            if self.model in {"", model.name}:
                self.model, self.vocab_size, self.max_model_len = model.name, model.vocab_size, model.max_model_len
                return
        served = ", ".join(model.name for model in answer.models) or "none"
        raise ConfigError(f"--model: found {self.model!r}, served are: {served}", field="model")

    async def generate(self, record: Record, prompt: list[int], max_tokens: int, clock: Callable[[], float]) -> None:
        """See Backend."""
        spec = pb.GenerationSpec(
            model=self.model,
            token_ids=pb.TokenIds(ids=prompt),
            sampling=pb.Sampling(temperature=0.0),
            stopping=pb.Stopping(max_tokens=max_tokens, ignore_eos=self._ignore_eos),
        )
        try:
            async for event in self._stub.GenerateStream(pb.GenerateStreamRequest(spec=spec)):
                count = sum(len(sample.token_ids) for sample in event.delta.samples)
                if count:
                    record.token_times.append(clock())
                    record.token_count += count
                elif event.HasField("finished"):
                    usage = event.finished.usage
                    record.cached_token_count = usage.cached_token_count
                    record.recomputed_token_count = usage.recomputed_token_count
                    record.preemption_count = usage.preemption_count
                    record.swap_count = usage.swap_count
                    record.queue_seconds = usage.queue_time.ToNanoseconds() / 1e9
        except grpc.aio.AioRpcError as error:
            record.failure = status.from_rpc_error(error).reason
        record.ended_at = clock()

    async def close(self) -> None:
        """See Backend."""
        await self._channel.close()


class OpenAIBackend:
    """A server with `POST /v1/completions`, which takes token ids and streams server-sent events.

    Each request has a thread while it runs: `threads` at most.
    """

    def __init__(self, url: str, model: str, vocab_size: int, threads: int, *, ignore_eos: bool) -> None:
        parts = urllib.parse.urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme != "http" or not parts.hostname:
            raise ConfigError(f"--address: found {url!r}, expected http://HOST:PORT", field="address")
        self._host, self._port = parts.hostname, parts.port or 80
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="client")
        self._ignore_eos = ignore_eos
        self.model = model
        self.vocab_size = vocab_size
        self.max_model_len = 0

    async def open(self) -> None:
        """See Backend."""
        answer = await asyncio.to_thread(self._models)
        names = [entry["id"] for entry in answer]
        if not names or (self.model and self.model not in names):
            message = f"--model: found {self.model!r}, served are: {', '.join(names) or 'none'}"
            raise ConfigError(message, field="model")
        self.model = self.model or names[0]
        self.max_model_len = next((entry.get("max_model_len") or 0 for entry in answer if entry["id"] == self.model), 0)

    def _models(self) -> list[dict[str, Any]]:
        with contextlib.closing(http.client.HTTPConnection(self._host, self._port, timeout=_ABOUT_SECONDS)) as link:
            try:
                link.request("GET", "/v1/models")
                models: list[dict[str, Any]] = json.loads(link.getresponse().read())["data"]
            except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
                message = f"--address: {self._host}:{self._port} does not answer GET /v1/models: {error!r}"
                raise ConfigError(message, field="address") from error
        return models

    async def generate(self, record: Record, prompt: list[int], max_tokens: int, clock: Callable[[], float]) -> None:
        """See Backend."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._threads, self._generate, record, prompt, max_tokens, clock)

    def _generate(self, record: Record, prompt: list[int], max_tokens: int, clock: Callable[[], float]) -> None:
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": self._ignore_eos,
        }
        with contextlib.closing(http.client.HTTPConnection(self._host, self._port)) as link:
            try:
                link.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
                response = link.getresponse()
                if response.status != _OK:
                    record.failure = f"HTTP_{response.status}"
                else:
                    for line in response:
                        self._event(record, line, clock)
            except (OSError, ValueError, http.client.HTTPException) as error:
                record.failure = type(error).__name__
        record.ended_at = clock()

    @staticmethod
    def _event(record: Record, line: bytes, clock: Callable[[], float]) -> None:
        """Takes in one line of a stream. A message counts as one token until the usage at the end says more."""
        data = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or data == b"[DONE]":
            return
        event = json.loads(data)
        if any(choice.get("text") for choice in event.get("choices", ())):
            record.token_times.append(clock())
            record.token_count += 1
        usage = event.get("usage")
        if usage:
            record.token_count = usage.get("completion_tokens", record.token_count)
            details = usage.get("prompt_tokens_details") or {}
            record.cached_token_count = details.get("cached_tokens") or 0

    async def close(self) -> None:
        """See Backend."""
        self._threads.shutdown(wait=False, cancel_futures=True)
