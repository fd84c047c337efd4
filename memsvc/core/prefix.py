"""Which block holds which content: identity <-> block, and what follows a prefix.

Publication has two phases. A block's tokens are noted when it is granted; it becomes matchable only by `publish_full`
or `publish_partial`, which the caller does after the executor has confirmed the writes.

Each published block is in two chained hash tables made of flat columns: by its identity, and by the identity of its
parent. A block that is forgotten stays linked and is skipped, until it is published again: forgetting many blocks is
one vector operation.

`_hint[b]` is the last block that was seen to follow b. It is only ever a guess: a matched path is verified as a whole
(published, right parent, equal tokens), which makes a long hit cheap: nothing is hashed on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import dataclasses
import enum

import numpy as np
import numpy.typing as npt

from memsvc.core.free_order import BlockIds
from quire import hashing
from quire.errors import InvariantError

_TOKEN_BYTES = 4
_DIGEST_BYTES = hashing.DIGEST_BYTES
# Blocks after one prefix that are compared for a partial match; bounds the work, not the correctness.
_SIBLING_LIMIT = 8
_HINT_WALK = 8
_EMPTY: BlockIds = np.zeros(0, np.int64)


class Publication(enum.IntEnum):
    """How far the content of a block can be matched."""

    NONE = 0
    """Not at all."""
    FULL = 1
    """As a full block, by its identity."""
    PARTIAL = 2
    """Only its head, by copy-on-write; the sequence that wrote it is gone."""
    DUPLICATE = 3
    """Not now: another block is published under the same identity."""


_NONE, _FULL, _PARTIAL, _DUPLICATE = (int(item) for item in Publication)


@dataclasses.dataclass(frozen=True, slots=True)
class PrefixMatch:
    """The longest known prefix of a prompt."""

    blocks: BlockIds
    """Blocks that hold the leading full blocks of the prompt."""
    identity: bytes
    """Identity of the last of them, or the root digest."""
    partial_block: int
    """Block whose head continues the prompt, to be copied; 0 for none."""
    partial_token_count: int
    """Tokens of the prompt that are in `partial_block`."""


@dataclasses.dataclass(slots=True)
class FreshContent:
    """Blocks that became full and written, in columns."""

    blocks: list[int] = dataclasses.field(default_factory=list)
    parents: list[bytes] = dataclasses.field(default_factory=list)
    """Identity of the block before each, or the root digest."""
    identities: list[bytes] = dataclasses.field(default_factory=list)
    """Of each block."""
    before: list[int] = dataclasses.field(default_factory=list)
    """The block before each in its table, 0 for none."""

    def add(self, blocks: list[int], parent: bytes, identities: list[bytes], before: int) -> None:
        """Adds blocks that follow one another, the first after `before`, whose identity is `parent`."""
        self.blocks += blocks
        self.identities += identities
        self.parents += [parent, *identities[:-1]]
        self.before += [before, *blocks[:-1]]


class DigestChains:
    """A multi-map from digests to blocks. The caller compares digests; this only finds candidates.

    Args:
        block_count: blocks of the pool.
    """

    __slots__ = ("_heads", "_mask", "_next")

    def __init__(self, block_count: int) -> None:
        size = 1 << max(4, (block_count - 1).bit_length())
        self._mask = size - 1
        self._heads = np.zeros(size, np.int32).data
        self._next = np.zeros(block_count, np.int32).data

    def candidates(self, digest: bytes) -> Iterator[int]:
        """Yields the blocks that may belong to `digest`, the newest first."""
        block = self._heads[int.from_bytes(digest[:8], "little") & self._mask]
        while block:
            yield block
            block = self._next[block]

    def link(self, digest: bytes, block: int) -> None:
        """Adds `block`, which is not linked."""
        bucket = int.from_bytes(digest[:8], "little") & self._mask
        self._next[block] = self._heads[bucket]
        self._heads[bucket] = block

    def unlink(self, digest: bytes, block: int) -> None:
        """Removes `block`, which was linked under `digest`."""
        bucket = int.from_bytes(digest[:8], "little") & self._mask
        following = self._next
        at = self._heads[bucket]
        if at == block:
            self._heads[bucket] = following[block]
            return
        while following[at] != block:
            at = following[at]
            if not at:
                message = f"block {block} is not linked under its digest"
                raise InvariantError(message, metadata={"block_id": block})
        following[at] = following[block]


class PrefixIndex:
    """Contents of the blocks of one pool.

    Args:
        block_count: blocks of the pool, the null block included.
        block_size: tokens in a block.
        chain: computes identities; `quire.hashing.chain` but in tests of collisions.

    Attributes:
        tokens: `[block, block_size]` token ids, as far as they are known.
        published: `[block]` a Publication.
        collision_count: times that equal identities had different tokens.
    """

    __slots__ = (
        "_block_size",
        "_by_identity",
        "_by_parent",
        "_chain",
        "_hint",
        "_identities",
        "_identity",
        "_linked",
        "_parent",
        "_parents",
        "_partial_length",
        "_published",
        "_token_bytes",
        "collision_count",
        "published",
        "tokens",
    )

    def __init__(
        self,
        block_count: int,
        block_size: int,
        chain: Callable[[bytes, bytes | memoryview, int], list[bytes]] = hashing.chain,
    ) -> None:
        self._block_size = block_size
        self._chain = chain
        self.tokens: npt.NDArray[np.uint32] = np.zeros((block_count, block_size), np.uint32)
        self._token_bytes = self.tokens.data.cast("B")
        self.published: npt.NDArray[np.uint8] = np.zeros(block_count, np.uint8)
        # The same memory again: reading one value of a view takes half the time.
        self._published = self.published.data
        self.collision_count = 0
        # The same memory twice: rows of two words to compare many, and bytes to slice one.
        self._identities = np.zeros((block_count, 2), np.uint64)
        self._parents = np.zeros((block_count, 2), np.uint64)
        self._identity = self._identities.data.cast("B")
        self._parent = self._parents.data.cast("B")
        self._linked = bytearray(block_count)
        # Tokens of a PARTIAL block that can be matched.
        self._partial_length = bytearray(block_count)
        self._hint = np.zeros(block_count, np.int32).data
        self._by_identity = DigestChains(block_count)
        self._by_parent = DigestChains(block_count)

    def identity(self, block: int) -> bytes:
        """Returns the 16-byte identity that prompts match, or nothing if there is none."""
        return self._digest(self._identity, block) if self.published[block] == _FULL else b""

    def block_of(self, identity: bytes) -> int:
        """Returns the block published under `identity`, or 0."""
        for block in self._by_identity.candidates(identity):
            if self._published[block] == _FULL and self._digest(self._identity, block) == identity:
                return block
        return 0

    def match(self, root: bytes, prompt: bytes) -> PrefixMatch:
        """Finds the longest known prefix of `prompt` that leaves at least one token to compute.

        Args:
            root: root digest of the sequence.
            prompt: token ids, packed little-endian u32.
        """
        size = self._block_size
        token_count = len(prompt) // _TOKEN_BYTES
        limit = (token_count - 1) // size
        words = np.frombuffer(prompt, "<u4", limit * size).reshape(limit, size)
        path: list[int] = []
        identity = root
        while len(path) < limit:
            self._follow_hints(path, root, words)
            if path:
                identity = self._digest(self._identity, path[-1])
            if len(path) == limit:
                break
            start = len(path) * size * _TOKEN_BYTES
            block = self._find(identity, prompt[start : start + size * _TOKEN_BYTES])
            if not block:
                break
            if path:
                self._hint[path[-1]] = block
            path.append(block)
            identity = self._digest(self._identity, block)
        done = len(path) * size
        rest = np.frombuffer(prompt, "<u4", min(size, token_count - 1 - done), done * _TOKEN_BYTES)
        partial, count = self._match_partial(identity, rest, is_end=len(path) == limit)
        return PrefixMatch(np.array(path, np.int64) if path else _EMPTY, identity, partial, count)

    def chain(self, parent: bytes, blocks: list[int]) -> list[bytes]:
        """Returns the identities of `blocks`, all full, the first of which follows `parent`."""
        if len(blocks) == 1:
            size = self._block_size * _TOKEN_BYTES
            start = blocks[0] * size
            return self._chain(parent, self._token_bytes[start : start + size], self._block_size)
        return self._chain(parent, self.tokens[blocks].tobytes(), self._block_size)

    def publish_full(self, fresh: FreshContent) -> list[tuple[int, int]]:
        """Makes full blocks matchable, in order.

        Returns:
            (block, other): `other` already is published with the same content. `block` is marked DUPLICATE and can be
            published when that one is gone.
        """
        blocks, linked = fresh.blocks, self._linked
        for block in blocks:
            if linked[block]:
                self._unlink(block)
        self._identities[blocks] = np.frombuffer(b"".join(fresh.identities), np.uint64).reshape(-1, 2)
        self._parents[blocks] = np.frombuffer(b"".join(fresh.parents), np.uint64).reshape(-1, 2)
        duplicates = []
        for block, parent, identity, before in zip(blocks, fresh.parents, fresh.identities, fresh.before, strict=True):
            other = self.block_of(identity)
            if not other:
                self._link(block, identity, parent, _FULL)
                self._hint[before] = block
            elif np.array_equal(self.tokens[other], self.tokens[block]):
                self._published[block] = _DUPLICATE
                duplicates.append((block, other))
            else:
                self.collision_count += 1
        return duplicates

    def publish_partial(self, block: int, parent: bytes, token_count: int) -> bool:
        """Makes the first `token_count` tokens of `block` matchable by copy; false if they already are elsewhere."""
        _, known = self._match_partial(parent, self.tokens[block, :token_count], is_end=True)
        if known == token_count:
            return False
        self._unlink(block)
        self._set_digest(self._parent, block, parent)
        self._link(block, b"", parent, _PARTIAL)
        self._partial_length[block] = token_count
        return True

    def republish(self, block: int) -> bool:
        """Publishes a DUPLICATE whose other is gone; false if it is not. Called when nobody uses the block any more."""
        identity = self._digest(self._identity, block)
        if self.block_of(identity):
            return False
        self._link(block, identity, self._digest(self._parent, block), _FULL)
        return True

    def forget(self, blocks: BlockIds) -> None:
        """Makes `blocks` match nothing."""
        self.published[blocks] = _NONE

    def _find(self, parent: bytes, tokens: bytes) -> int:
        """Returns the block that holds `tokens` (one full block) after `parent`, or 0."""
        identity = self._chain(parent, tokens, self._block_size)[0]
        block = self.block_of(identity)
        if block and self.tokens[block].tobytes() != tokens:
            self.collision_count += 1
            return 0
        return block

    def _follow_hints(self, path: list[int], root: bytes, words: npt.NDArray[np.uint32]) -> None:
        """Extends `path` as long as the hints lead to blocks that verify against `words` (`[block, block_size]`)."""
        hint = self._hint
        walk = _HINT_WALK
        while len(path) < len(words):
            start = len(path)
            block = hint[path[-1]] if start else next(self._by_parent.candidates(root), 0)
            guess = []
            for _ in range(min(walk, len(words) - start)):
                if not block:
                    break
                guess.append(block)
                block = hint[block]
            if not guess:
                return
            blocks = np.array(guess)
            good = self.published[blocks] == _FULL
            good &= (self.tokens[blocks] == words[start : start + len(blocks)]).all(axis=1)
            before = np.frombuffer(root, np.uint64) if not start else self._identities[path[-1]]
            expected = np.concatenate((before[None], self._identities[blocks[:-1]]))
            good &= (self._parents[blocks] == expected).all(axis=1)
            right = len(guess) if good.all() else int(good.argmin())
            path.extend(guess[:right])
            if right < len(guess):
                return
            walk *= 4

    def _match_partial(self, parent: bytes, rest: npt.NDArray[np.uint32], *, is_end: bool) -> tuple[int, int]:
        """Returns the block after `parent` that shares most leading tokens with `rest`, and how many.

        Args:
            parent: identity of the last full block that matched.
            rest: tokens after it, at most one block.
            is_end: nothing but the token to compute follows `rest`.
        """
        best, best_count = 0, 0
        seen = 0
        for block in self._by_parent.candidates(parent):
            state = self._published[block]
            if state not in {_FULL, _PARTIAL} or self._digest(self._parent, block) != parent:
                continue
            length = len(rest)
            if state == _PARTIAL:
                length = min(length, self._partial_length[block])
            different = np.flatnonzero(self.tokens[block, :length] != rest[:length])
            count = int(different[0]) if len(different) else length
            if count > best_count:
                best, best_count = block, count
            seen += 1
            if seen == _SIBLING_LIMIT or best_count == len(rest):
                break
        # A copy is not free: it must save a quarter of a block, or all that there is left to save.
        worth = best_count * 4 >= self._block_size or (is_end and best_count == len(rest))
        return (best, best_count) if best and worth else (0, 0)

    def _link(self, block: int, identity: bytes, parent: bytes, state: int) -> None:
        if state == _FULL:
            self._by_identity.link(identity, block)
        self._by_parent.link(parent, block)
        self._linked[block] = state
        self._published[block] = state

    def _unlink(self, block: int) -> None:
        """Takes a forgotten block out of the chains."""
        if self._linked[block]:
            if self._linked[block] == _FULL:
                self._by_identity.unlink(self._digest(self._identity, block), block)
            self._by_parent.unlink(self._digest(self._parent, block), block)
            self._linked[block] = 0

    @staticmethod
    def _digest(column: memoryview, block: int) -> bytes:
        return bytes(column[block * _DIGEST_BYTES : (block + 1) * _DIGEST_BYTES])

    @staticmethod
    def _set_digest(column: memoryview, block: int, digest: bytes) -> None:
        column[block * _DIGEST_BYTES : (block + 1) * _DIGEST_BYTES] = digest
