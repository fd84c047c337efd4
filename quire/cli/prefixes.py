"""`quire explain`, `prefixes`, `pin`, `release` and `evict`: what a pool caches, why not more, and what is kept."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from protos.memsvc.v1 import admin_pb2
from quire import columns
from quire.cli import options
from quire.cli.admin import AdminClient
from quire.cli.cache import Pool
from quire.cli.locate import parse_tokens, tokenize
from quire.cli.output import console, enum_name, notices, print_json, print_table
from quire.errors import InvalidRequestError

Prompt = Annotated[str, typer.Argument(metavar="PROMPT", help="Text, or - to read it from standard input.")]
TokenIds = Annotated[bool, typer.Option("--token-ids", help="PROMPT is token ids, separated by blanks or commas.")]
Tenant = Annotated[str, typer.Option(help="Tenant whose blocks count.")]
CacheSalt = Annotated[str, typer.Option(help="Salt that the request would carry.")]
Identity = Annotated[bool, typer.Option("--identity", help="PROMPT is an identity in hex, as `quire prefixes` shows.")]
_DIGEST_BYTES = 16


def _tokens(prompt: str, memsvc: str, *, token_ids: bool) -> bytes:
    """Returns the tokens of a prompt as a column."""
    text = sys.stdin.read() if prompt == "-" else prompt
    return columns.pack(parse_tokens(text) if token_ids else tokenize(text, memsvc, ""))


def _selector(
    prompt: str, memsvc: str, *, token_ids: bool, identity: bool, tenant: str, cache_salt: str
) -> admin_pb2.PrefixSelector:
    """Returns the prefix that the arguments name; raises InvalidRequestError."""
    if not identity:
        tokens = _tokens(prompt, memsvc, token_ids=token_ids)
        return admin_pb2.PrefixSelector(token_ids=tokens, tenant=tenant, cache_salt=cache_salt)
    try:
        digest = bytes.fromhex(prompt)
    except ValueError:
        digest = b""
    if len(digest) != _DIGEST_BYTES:
        raise InvalidRequestError(
            f"PROMPT: {prompt[:64]!r} is not an identity of 32 hexadecimal digits", field="prompt"
        )
    return admin_pb2.PrefixSelector(identity=digest)


def explain(
    *,
    pool: Pool,
    prompt: Prompt,
    token_ids: TokenIds = False,
    tenant: Tenant = "",
    cache_salt: CacheSalt = "",
    memsvc: options.Memsvc = options.MEMSVC_ADDRESS,
    json: options.Json = False,
) -> None:
    """Say how much of a prompt a pool has cached, and why not more.

    For example:

        quire explain executor-0 "You are a helpful assistant."
    """
    tokens = _tokens(prompt, memsvc, token_ids=token_ids)
    request = admin_pb2.ExplainPrefixRequest(pool_id=pool, token_ids=tokens, tenant=tenant, cache_salt=cache_salt)
    with AdminClient(memsvc) as admin:
        found = admin.explain(request)
    if json:
        print_json(found)
        return
    reason = enum_name(found.DESCRIPTOR.fields_by_name["reason"], found.reason)
    console().print(f"{found.cached_token_count} of {found.token_count} tokens are cached", soft_wrap=True)
    console().print(f"block {found.block_index}: {reason}: {found.explanation}", soft_wrap=True)


def prefixes(
    *,
    pool: Pool,
    least: Annotated[int, typer.Option("--least", min=1, help="Shared by at least so many references.")] = 2,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many.")] = 20,
    memsvc: options.Memsvc = options.MEMSVC_ADDRESS,
    json: options.Json = False,
) -> None:
    """List the prefixes that sequences share, those that save most first.

    For example:

        quire prefixes executor-0
    """
    with AdminClient(memsvc) as admin:
        found = admin.prefixes(pool, least, limit)
    if json:
        print_json(found)
        return
    headings = [("TOKENS", True), ("BLOCKS", True), ("REFERENCES", True), ("SAVED MIB", True), ("IDENTITY", False)]
    rows = [
        (one.token_count, one.block_count, one.ref_count, f"{one.saved_bytes / 2**20:.1f}", one.identity.hex())
        for one in found
    ]
    print_table(headings, rows)
    if not found:
        notices().print("no prefix is shared now")


def pin(
    *,
    pool: Pool,
    prompt: Prompt,
    token_ids: TokenIds = False,
    identity: Identity = False,
    tenant: Tenant = "",
    cache_salt: CacheSalt = "",
    memsvc: options.Memsvc = options.MEMSVC_ADDRESS,
) -> None:
    """Keep what a pool has cached of a prompt until it is released; counts against the tenant's quota of pins.

    For example:

        quire quota executor-0 team-a --pinned 50

        quire pin executor-0 --tenant team-a - < system-prompt.txt
    """
    prefix = _selector(prompt, memsvc, token_ids=token_ids, identity=identity, tenant=tenant, cache_salt=cache_salt)
    with AdminClient(memsvc) as admin:
        console().print(f"{admin.pin(pool, prefix)} blocks are pinned")


def release(
    *,
    pool: Pool,
    prompt: Prompt,
    token_ids: TokenIds = False,
    identity: Identity = False,
    tenant: Tenant = "",
    cache_salt: CacheSalt = "",
    memsvc: options.Memsvc = options.MEMSVC_ADDRESS,
) -> None:
    """Let go of what was pinned of a prompt.

    For example:

        quire release executor-0 --tenant team-a - < system-prompt.txt
    """
    prefix = _selector(prompt, memsvc, token_ids=token_ids, identity=identity, tenant=tenant, cache_salt=cache_salt)
    with AdminClient(memsvc) as admin:
        console().print(f"{admin.release(pool, prefix)} blocks were released")


def evict(
    *,
    pool: Pool,
    prompt: Prompt,
    token_ids: TokenIds = False,
    identity: Identity = False,
    tenant: Tenant = "",
    cache_salt: CacheSalt = "",
    memsvc: options.Memsvc = options.MEMSVC_ADDRESS,
) -> None:
    """Forget what a pool has cached of a prompt and of all that continues it, but for what is used or pinned.

    For example:

        quire evict executor-0 "The text that must go"
    """
    prefix = _selector(prompt, memsvc, token_ids=token_ids, identity=identity, tenant=tenant, cache_salt=cache_salt)
    with AdminClient(memsvc) as admin:
        done = admin.evict(pool, prefix)
    console().print(f"{done.block_count} blocks were forgotten, {done.kept_block_count} stay")
