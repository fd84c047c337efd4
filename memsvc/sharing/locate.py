"""`Locator`: which pools hold how much of a prompt.

Pools of this process are asked directly. Those of others are looked up in the hints: the chain of identities is hashed
only as far as somebody holds it, in pieces that grow, each of which is one search of the index. While the answer about
one piece is awaited the next is hashed, so that a hit takes hardly longer than hashing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
import dataclasses
import time
from typing import Any

from memsvc.core.memory import MemoryCore
from memsvc.core.validation import TEXT_LENGTH_MAXIMUM
from memsvc.store.base import HintOwner, HintSpace, ServiceRecord, Store
from quire import hashing, media
from quire.errors import InvalidRequestError, StoreUnavailableError
from quire.memory import AdmitRequest

_TOKEN_BYTES = 4
# Tokens of a piece: a search costs about as much as hashing 30,000 tokens, so that two are enough for nearly all.
_PIECES = (1024, 65536)
# Tokens hashed at a time before others may run: some 50 microseconds.
_SLICE_TOKENS = 4096


@dataclasses.dataclass(frozen=True, slots=True)
class Query:
    """A prompt and what separates its blocks from those of others; see `quire.memory.AdmitRequest`."""

    token_ids: bytes
    tenant: str = ""
    cache_salt: str = ""
    adapter: str = ""
    model_id: str = ""
    """Only pools of this model; empty for all."""
    media: tuple[media.MediaItem, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Location:
    """A pool that holds the beginning of a prompt."""

    owner: HintOwner
    token_count: int
    """Leading tokens that it holds."""
    is_exact: bool
    """Whether the pool itself was asked; else it is a hint, which may be wrong."""


@dataclasses.dataclass(frozen=True, slots=True)
class Located:
    """The answer to a query."""

    locations: list[Location]
    """Most tokens first; pools that hold nothing are left out."""
    hints_searched: bool
    """Whether the store answered; without it only the pools of this process are known."""


class Locator:
    """Finds prompts.

    Args:
        core: the pools of this process.
        store: the hints of all.
        tenant_secret: from which tenants' salts are derived; hints mean something only to those who have the same.
        refresh_interval: seconds for which the list of executors is believed.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        core: MemoryCore,
        store: Store,
        tenant_secret: bytes,
        *,
        refresh_interval: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._core = core
        self._store = store
        self._tenant_secret = tenant_secret
        self._refresh_interval = refresh_interval
        self._clock = clock
        self._service = ServiceRecord("memsvc", "", 0, "")
        self._spaces: set[HintSpace] = set()
        self._refresh_at = 0.0

    def start(self, service: ServiceRecord) -> None:
        """Begins to answer on behalf of `service`."""
        self._service = service

    async def locate(self, query: Query) -> Located:
        """Returns who holds how much of a prompt.

        Raises:
            InvalidRequestError: a field of the query cannot be.
        """
        _check(query)
        locations = self._local(query)
        searched = True
        try:
            for space in await self._remote_spaces():
                if query.model_id in {"", space.model_id}:
                    locations += await self._hinted(query, space)
        except StoreUnavailableError:
            searched = False
        locations.sort(key=lambda location: (-location.token_count, location.owner.pool_id))
        return Located(locations, searched)

    def _local(self, query: Query) -> list[Location]:
        """Asks the pools of this process."""
        found = []
        for pool_id, pool in self._core.pools.items():
            registration = pool.registration
            if not pool.ready or query.model_id not in {"", registration.spec.model_id}:
                continue
            request = AdmitRequest(
                pool_id=pool_id,
                epoch=pool.epoch,
                request_id="locate",
                sample_index=0,
                token_ids=query.token_ids,
                tenant=query.tenant,
                cache_salt=query.cache_salt,
                adapter=query.adapter,
                media=query.media,
            )
            token_count = self._core.locate(request)
            if token_count:
                owner = HintOwner(
                    pool_id,
                    registration.executor_incarnation,
                    registration.address,
                    self._service.name,
                    self._service.nonce,
                    self._service.address,
                )
                found.append(Location(owner, token_count, is_exact=True))
        return found

    async def _remote_spaces(self) -> set[HintSpace]:
        """Returns the spaces of executors that are not this process's own."""
        now = self._clock()
        if now >= self._refresh_at:
            records = await self._store.services("executor")
            own = {pool_id for pool_id, pool in self._core.pools.items() if pool.ready}
            parsed = [HintSpace.parse(record.space) for record in records if record.name not in own]
            self._spaces = {space for space in parsed if space is not None}
            self._refresh_at = now + self._refresh_interval
        return self._spaces

    async def _hinted(self, query: Query, space: HintSpace) -> list[Location]:
        """Searches the hints of one space, further as long as somebody holds all that was searched."""
        salt = hashing.tenant_salt(self._tenant_secret, query.tenant)
        root = hashing.PrefixRoot(
            space.model_id, space.block_size, space.kv_dtype, query.adapter, salt, query.cache_salt
        ).digest()
        depths: dict[HintOwner, int] = {}
        depth = 0
        pieces = _pieces(query, space, root)
        piece = next(pieces, None)
        while piece is not None:
            await piece.finish()
            search = asyncio.create_task(self._store.hints.find(space.key, piece.identities))
            try:
                ahead = next(pieces, None)
                if ahead is not None:
                    await ahead.finish(unless=search)
                found = await search
            finally:
                search.cancel()
            # Whoever stopped before this piece does not hold what comes after, whatever a hint says.
            reached = {match.owner: match.depth for match in found if depths.get(match.owner, 0) == depth}
            depths.update({owner: depth + count for owner, count in reached.items()})
            depth += piece.size
            piece = ahead if depth in depths.values() else None
        tokens = space.block_size * space.stride
        incarnation = self._service.nonce
        return [
            Location(owner, count * tokens, is_exact=False)
            for owner, count in depths.items()
            if owner.memsvc_incarnation != incarnation
        ]


def _check(query: Query) -> None:
    """Raises InvalidRequestError if a field cannot be."""
    if not query.token_ids or len(query.token_ids) % _TOKEN_BYTES:
        message = f"token_ids: {len(query.token_ids)} bytes, expected at least one token of {_TOKEN_BYTES} bytes"
        raise InvalidRequestError(message, field="token_ids")
    for field in ("tenant", "cache_salt", "adapter", "model_id"):
        length = len(getattr(query, field))
        if length > TEXT_LENGTH_MAXIMUM:
            message = f"{field}: {length} characters, allowed are at most {TEXT_LENGTH_MAXIMUM}"
            raise InvalidRequestError(message, field=field)
    media.check(query.media, len(query.token_ids) // _TOKEN_BYTES)


class _Piece:
    """Some of the identities that hints are kept for, hashed lazily.

    Attributes:
        size: how many they are.
        identities: those hashed so far, one after the other.
    """

    def __init__(self, size: int, slices: Iterator[list[bytes]]) -> None:
        self.size = size
        self.identities = b""
        self._slices = slices

    async def finish(self, unless: asyncio.Task[Any] | None = None) -> None:
        """Hashes what is left of it, a slice at a time, as long as `unless` is not done."""
        for part in self._slices:
            self.identities += b"".join(part)
            await asyncio.sleep(0)
            if unless is not None and unless.done():
                return


def _pieces(query: Query, space: HintSpace, root: bytes) -> Iterator[_Piece]:
    """Yields the pieces of the chain; one must be finished before the next."""
    token_ids = query.token_ids
    extras = media.block_extras(query.media, space.block_size)
    stride_tokens = space.block_size * space.stride
    strides = len(token_ids) // _TOKEN_BYTES // stride_tokens
    last = root

    def hashed(start: int, stop: int) -> Iterator[list[bytes]]:
        nonlocal last
        for begin in range(start, stop, _SLICE_TOKENS // stride_tokens):
            end = min(stop, begin + _SLICE_TOKENS // stride_tokens)
            data = token_ids[begin * stride_tokens * _TOKEN_BYTES : end * stride_tokens * _TOKEN_BYTES]
            chain = hashing.chain_with(last, data, space.block_size, begin * space.stride, extras)
            last = chain[-1]
            yield chain[space.stride - 1 :: space.stride]

    start = 0
    sizes = iter(_PIECES)
    while start < strides:
        stop = min(strides, start + next(sizes, strides * stride_tokens) // stride_tokens)
        yield _Piece(stop - start, hashed(start, stop))
        start = stop
