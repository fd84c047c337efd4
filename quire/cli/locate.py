"""`quire locate`: which pools hold the beginning of a prompt."""

from __future__ import annotations

import hashlib
import re
import sys
from typing import Annotated, Final

import grpc
from tokenizers import Tokenizer
import typer

from protos.execsvc.v1 import execsvc_pb2, execsvc_pb2_grpc
from protos.memsvc.v1 import memsvc_pb2, memsvc_pb2_grpc
from quire import columns
from quire.cli import options
from quire.cli.admin import AdminClient
from quire.cli.output import notices, print_json, print_table
from quire.client import as_quire_error
from quire.errors import CorruptionError, InvalidRequestError, PoolNotFoundError
from quire.rpc import CHANNEL_OPTIONS

_TIMEOUT_SECONDS: Final = 10.0
_TOKEN_MAXIMUM: Final = 2**32 - 1


def locate(
    *,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text, or - to read it from standard input.")],
    memsvc: options.Memsvc = options.MEMSVC_ADDRESS,
    token_ids: Annotated[
        bool, typer.Option("--token-ids", help="PROMPT is token ids, separated by blanks or commas.")
    ] = False,
    model: Annotated[str, typer.Option(help="Only pools of this model.")] = "",
    tenant: Annotated[str, typer.Option(help="Tenant whose blocks count.")] = "",
    cache_salt: Annotated[str, typer.Option(help="Salt that the request would carry.")] = "",
    json: options.Json = False,
) -> None:
    """Find which pools hold the beginning of a prompt, those of other memory services on the same store included.

    Text is made tokens with the tokenizer of an executor that this memsvc knows.

    For example:

        quire locate "You are a helpful assistant."

        quire locate --token-ids - < tokens.txt
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    tokens = parse_tokens(text) if token_ids else tokenize(text, memsvc, model)
    request = memsvc_pb2.LocateRequest(
        token_ids=columns.pack(tokens), tenant=tenant, cache_salt=cache_salt, model_id=model
    )
    with grpc.insecure_channel(memsvc, options=CHANNEL_OPTIONS) as channel:
        try:
            found = memsvc_pb2_grpc.MemoryServiceStub(channel).Locate(request, timeout=_TIMEOUT_SECONDS)
        except grpc.RpcError as error:
            raise as_quire_error(error, memsvc) from None
    if json:
        print_json(found)
        return
    headings = [("POOL", False), ("TOKENS", True), ("OF", True), ("", False), ("EXECUTOR", False), ("MEMSVC", False)]
    rows = [
        (
            *(one.pool_id, one.token_count, len(tokens), "exact" if one.exact else "hint"),
            *(one.executor_address, f"{one.memsvc_id} ({one.memsvc_address})"),
        )
        for one in found.locations
    ]
    print_table(headings, rows)
    if not rows:
        notices().print("no pool holds the beginning of this prompt")
    if not found.hints_searched:
        notices().print("the store did not answer: pools of other memory services are not shown")


def parse_tokens(text: str) -> list[int]:
    """Returns the token ids in a text; raises InvalidRequestError."""
    words = [word for word in re.split(r"[\s,\[\]]+", text) if word]
    wrong = next((word for word in words if not (word.isascii() and word.isdigit())), None)
    if wrong is not None or any(int(word) > _TOKEN_MAXIMUM for word in words):
        message = f"PROMPT: {(wrong or 'a number')[:64]!r} is not a token id, 0 .. {_TOKEN_MAXIMUM}"
        raise InvalidRequestError(message, field="prompt")
    return [int(word) for word in words]


def tokenize(text: str, memsvc: str, model: str) -> list[int]:
    """Returns the tokens of a text, by the tokenizer of an executor.

    Raises:
        PoolNotFoundError: this memsvc knows no executor of the model.
        CorruptionError: the tokenizer arrived damaged.
    """
    with AdminClient(memsvc) as admin:
        pools = [pool for pool in admin.pools() if model in {"", pool.spec.model_id}]
    if not pools:
        message = f"the memsvc at {memsvc} knows no executor that could make tokens of a text; use --token-ids"
        raise PoolNotFoundError(message)
    address = pools[0].executor_address
    with grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        stub = execsvc_pb2_grpc.ExecutorServiceStub(channel)
        try:
            described = stub.Describe(execsvc_pb2.DescribeRequest(), timeout=_TIMEOUT_SECONDS)
            parts = list(stub.GetTokenizer(execsvc_pb2.GetTokenizerRequest(), timeout=_TIMEOUT_SECONDS))
        except grpc.RpcError as error:
            raise as_quire_error(error, address) from None
    content = b"".join(part.chunk for part in parts)
    if not parts or hashlib.sha256(content).digest() != parts[0].sha256:
        raise CorruptionError("tokenizer.json arrived damaged: its SHA-256 is not the one announced")
    tokenizer = Tokenizer.from_buffer(content)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=described.model.add_bos_token).ids
    return ids
