"""Looks at what is cached and shared, and finds out why a prompt is not. Changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import enum
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from memsvc.core import retention
from memsvc.core.content import PrefixMatch, Publication
from memsvc.core.free_order import BlockIds
from memsvc.core.pool import BlockState
from quire.window import hit_block_count

if TYPE_CHECKING:
    from memsvc.core.pool_memory import PoolMemory

_TOKEN_BYTES = 4
# An odd number, which spreads references over a word: 2**64 divided by the golden ratio.
_SPREAD: Final = np.uint64(0x9E3779B97F4A7C15)

# More than any block's position.
_BEHIND_ALL: Final = 2**31

Words = npt.NDArray[np.uint32]
Mask = npt.NDArray[np.bool_]


class MissReason(enum.IntEnum):
    """Why a prompt is not cached any further; the numbers are those of `quire.memsvc.v1.MissReason`."""

    NONE = 1
    """All of it is cached."""
    TOO_SHORT = 2
    """What is left is shorter than a block, and no cached block begins so."""
    NOT_COMMITTED = 3
    """A sequence that began like it computes the next block; the executor has not confirmed it yet."""
    EVICTED = 4
    """It was cached, and was evicted."""
    OTHER_SCOPE = 5
    """The tenant has the same tokens cached under another salt, adapter or beginning."""
    OTHER_TENANT = 6
    """Another tenant has the same tokens cached."""
    NEVER_SEEN = 7
    """Nothing like it was cached for as long as is remembered."""


@dataclasses.dataclass(frozen=True, slots=True)
class Explanation:
    """How much of a prompt is cached, and why not more."""

    cached_token_count: int
    block_index: int
    """Position of the first block that is not cached as a whole."""
    reason: MissReason
    evicted_at: float = 0.0
    block: int = 0
    """The block that has the tokens, where one of the same tenant does."""


@dataclasses.dataclass(frozen=True, slots=True)
class SharedPrefix:
    """The end of a run of blocks that equally many references share."""

    block: int
    block_count: int
    ref_count: int


@dataclasses.dataclass(frozen=True, slots=True)
class PrefixSelector:
    """Names a prefix: by its tokens and whose they are, or by the identity of its last block."""

    token_ids: bytes = b""
    tenant: str = ""
    cache_salt: str = ""
    adapter: str = ""
    identity: bytes = b""


@dataclasses.dataclass(frozen=True, slots=True)
class Path:
    """The full blocks of a prefix as far as they are there, and where it ends."""

    blocks: BlockIds
    """Those that are published, the beginning first; there may be gaps."""
    identity: bytes
    """Of the last full block, there or not; the root digest if there is none."""
    rest: Words
    """Tokens behind the last full block."""


def find_match(memory: PoolMemory, token_ids: bytes, root: bytes) -> PrefixMatch:
    """Returns what an admission would find of a prompt if it need not leave a token to compute."""
    prefix, counted = memory.prefix, memory.prefix.collision_count
    data = token_ids + bytes(_TOKEN_BYTES)
    if memory.window:
        match = prefix.match_window(root, data, hit_block_count(memory.window, memory.spec.block_size))
    else:
        match = prefix.match(root, data, learn=False)
    prefix.collision_count = counted
    return match


def explain(memory: PoolMemory, token_ids: bytes, root: bytes, tag: int) -> Explanation:
    """Returns how much of a prompt is cached, and why not more.

    Tokens of others are compared by whole blocks of published content only: who asks cannot feel their way along them.

    Args:
        memory: the pool.
        token_ids: the prompt, packed.
        root: its root digest.
        tag: of its tenant.
    """
    size = memory.spec.block_size
    match = find_match(memory, token_ids, root)
    count, index = len(token_ids) // _TOKEN_BYTES, len(match.blocks)
    cached = min(count, index * size + match.partial_token_count)
    if cached == count:
        return Explanation(cached, index, MissReason.NONE)
    words = np.frombuffer(token_ids, "<u4")[index * size : (index + 1) * size]
    if len(words) < size:
        return Explanation(cached, index, MissReason.TOO_SHORT)
    table = memory.pending.find(match.identity + words.tobytes())
    if table:
        record = memory.tables.record(memory.tables.slot(table))
        return Explanation(cached, index, MissReason.NOT_COMMITTED, block=record.blocks[index])
    identity = memory.prefix.chain_tokens(match.identity, words.tobytes(), index, {})[0]
    evicted = memory.evictions.when(identity)
    if evicted is not None:
        return Explanation(cached, index, MissReason.EVICTED, evicted_at=evicted)
    same = np.flatnonzero((memory.prefix.tokens == words).all(axis=1) & (memory.prefix.published == Publication.FULL))
    own = same[memory.pool.tenant[same] == tag]
    if len(own):
        return Explanation(cached, index, MissReason.OTHER_SCOPE, block=int(own[0]))
    return Explanation(cached, index, MissReason.OTHER_TENANT if len(same) else MissReason.NEVER_SEEN)


def path_of_tokens(memory: PoolMemory, token_ids: bytes, root: bytes) -> Path:
    """Returns the path of a prompt."""
    size, prefix = memory.spec.block_size, memory.prefix
    words = np.frombuffer(token_ids, "<u4")
    full = len(words) // size
    identities = prefix.chain_tokens(root, words[: full * size].tobytes(), 0, {}) if full else []
    blocks = [prefix.block_of(identity) for identity in identities]
    rows = words[: full * size].reshape(full, size)
    there = [block for block, row in zip(blocks, rows, strict=True) if block and (prefix.tokens[block] == row).all()]
    return Path(np.array(there, np.int64), identities[-1] if full else root, words[full * size :])


def path_of_identity(memory: PoolMemory, identity: bytes) -> Path:
    """Returns the path up to the block of an identity, as far as its beginning is there without a gap."""
    path: list[int] = []
    block = memory.prefix.block_of(identity)
    while block:
        path.append(block)
        block = memory.prefix.block_of(memory.prefix.parent(block))
    return Path(np.array(path[::-1], np.int64), identity, np.zeros(0, np.uint32))


def is_whole(memory: PoolMemory, path: Path) -> bool:
    """Returns whether prompts can match all full blocks of a path that was found by its identity."""
    if not len(path.blocks):
        return False
    count = int(memory.prefix.index[path.blocks[-1]]) + 1
    needed = min(count, hit_block_count(memory.window, memory.spec.block_size)) if memory.window else count
    return len(path.blocks) >= needed


def parents_of(memory: PoolMemory) -> BlockIds:
    """Returns `[block]` the block that each one that prompts can match directly continues; 0 where there is none."""
    blocks = np.flatnonzero(_matchable(memory))
    parents = np.zeros(memory.pool.block_count, np.int64)
    parents[blocks] = memory.prefix.blocks_of(memory.prefix.parents[blocks])
    return parents


def with_continuations(mask: Mask, parents: BlockIds) -> Mask:
    """Returns `mask` and all that continues it, at any distance; see `parents_of`."""
    for ancestors in _leaps(parents):
        mask = mask | mask[ancestors]
    return mask


def with_beginnings(mask: Mask, parents: BlockIds) -> Mask:
    """Returns `mask` and all that it begins with, at any distance."""
    mask = mask.copy()
    for ancestors in _leaps(parents):
        mask[ancestors[mask]] = True
        mask[0] = False
    return mask


def continuations(memory: PoolMemory, path: Path, parents: BlockIds) -> Mask:
    """Returns `[block]` which blocks continue a path."""
    prefix = memory.prefix
    last = np.frombuffer(path.identity, np.uint64)
    first = _matchable(memory) & (prefix.parents == last).all(axis=1)
    if len(path.rest):
        # What can be matched is the beginning of the rest, or begins with it.
        partial = prefix.published == Publication.PARTIAL
        lengths = np.where(partial, np.frombuffer(prefix.partial_length, np.uint8), len(path.rest))
        equal = prefix.tokens[:, : len(path.rest)] == path.rest
        first &= (equal | (np.arange(len(path.rest)) >= lengths[:, None])).all(axis=1)
    return with_continuations(first, parents)


def evictable(memory: PoolMemory, mask: Mask, parents: BlockIds) -> BlockIds:
    """Returns those of the blocks in `mask` that nobody uses, pins, or begins with, the end of a prefix first."""
    may = mask & (memory.pool.state == BlockState.CACHED)
    if memory.tenancy is not None:
        may &= memory.tenancy.retention != retention.PINNED
    found = np.flatnonzero(may & ~with_beginnings(_matchable(memory) & ~may, parents))
    whole = memory.prefix.published[found] == Publication.FULL
    return found[np.argsort(-np.where(whole, memory.prefix.index[found], _BEHIND_ALL), kind="stable")]


def _matchable(memory: PoolMemory) -> Mask:
    """Returns `[block]` which blocks prompts can match, whole or their heads."""
    published = memory.prefix.published
    matchable: Mask = (published == Publication.FULL) | (published == Publication.PARTIAL)
    return matchable


def _leaps(parents: BlockIds) -> Iterator[BlockIds]:
    """Yields each block's ancestor at distance 1, 2, 4, 8, ... as long as there are any.

    Who takes all leaps in turn comes to every ancestor, in as many vector operations as the longest prefix has digits.
    """
    for _ in range(len(parents).bit_length()):
        if not parents.any():
            return
        yield parents
        parents = parents[parents]


def shared_prefixes(memory: PoolMemory, least: int) -> list[SharedPrefix]:
    """Returns the prefixes that at least `least` references share, those that save most first.

    A prefix ends where the next block has fewer references. What it saves is its blocks, but for one reference.
    """
    refs, prefix = memory.pool.refs, memory.prefix
    blocks = np.flatnonzero((prefix.published == Publication.FULL) & (refs >= max(1, least)))
    spread = refs[blocks].astype(np.uint64) * _SPREAD
    # Identities are digests: half of one and the references tell the blocks of a pool apart.
    parents = prefix.parents[blocks, 0] ^ spread
    ends = blocks[~np.isin(prefix.identities[blocks, 0] ^ spread, parents)]
    counts, shared = prefix.index[ends].astype(np.int64) + 1, refs[ends].astype(np.int64)
    order = np.lexsort((ends, -shared, -counts * (shared - 1)))
    rows = zip(ends[order].tolist(), counts[order].tolist(), shared[order].tolist(), strict=True)
    return [SharedPrefix(*row) for row in rows]
