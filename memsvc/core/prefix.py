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

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from memsvc.core.content import NO_EXTRAS, FreshContent, PrefixMatch, Publication
from memsvc.core.digest_chains import DigestChains
from memsvc.core.events import BlocksRemoved, BlocksStored, CacheCleared, CacheEvent
from memsvc.core.free_order import BlockIds
from quire import hashing, native
from quire.errors import InvariantError

_TOKEN_BYTES = 4
_DIGEST_BYTES = hashing.DIGEST_BYTES
# Blocks after one prefix that are compared for a partial match; bounds the work, not the correctness.
_SIBLING_LIMIT = 8
_HINT_WALK = 8
# From so many blocks on, vector operations beat a loop.
_MANY = 8
_EMPTY: BlockIds = np.zeros(0, np.int64)

_NONE, _FULL, _PARTIAL, _DUPLICATE = (int(item) for item in Publication)


class PrefixIndex:
    """Contents of the blocks of one pool.

    Args:
        block_count: blocks of the pool, the null block included.
        block_size: tokens in a block.
        chain: computes identities; `quire.hashing.chain` but in tests of collisions.
        tenants: `[block]` tag of the tenant of each block, kept by the caller, for events.

    Attributes:
        tokens: `[block, block_size]` token ids, as far as they are known.
        token_words: the same memory, flat: writing a few tokens through a view costs a fraction.
        published: `[block]` a Publication.
        identities, parents: `[block, 2]` the identity of each published block (0 if PARTIAL), and of the one before.
        partial_length: `[block]` tokens of a PARTIAL block that can be matched.
        index: `[block]` position of the block in the sequence that filled it.
        collision_count: times that equal identities had different tokens.
        events: what was published and forgotten, oldest first; None while nobody wants to know.
        native: the same columns in the accelerator; None without one, or with another `chain`.
    """

    __slots__ = (
        "_block_size",
        "_by_identity",
        "_by_parent",
        "_chain",
        "_has_extra",
        "_hint",
        "_identity",
        "_linked",
        "_parent",
        "_published",
        "_tenants",
        "_token_bytes",
        "collision_count",
        "events",
        "identities",
        "index",
        "native",
        "parents",
        "partial_length",
        "published",
        "token_words",
        "tokens",
    )

    def __init__(
        self,
        block_count: int,
        block_size: int,
        chain: Callable[[bytes, bytes | memoryview, int], list[bytes]] = hashing.chain,
        tenants: npt.NDArray[np.uint32] | None = None,
    ) -> None:
        self._block_size = block_size
        self._tenants = np.zeros(block_count, np.uint32) if tenants is None else tenants
        self._chain = chain
        self.tokens: npt.NDArray[np.uint32] = np.zeros((block_count, block_size), np.uint32)
        self._token_bytes = self.tokens.data.cast("B")
        self.token_words = self._token_bytes.cast("I")
        self.published: npt.NDArray[np.uint8] = np.zeros(block_count, np.uint8)
        # The same memory again: reading one value of a view takes half the time.
        self._published = self.published.data
        self.collision_count = 0
        # The same memory twice: rows of two words to compare many, and bytes to slice one.
        self.identities = np.zeros((block_count, 2), np.uint64)
        self.parents = np.zeros((block_count, 2), np.uint64)
        self._identity = self.identities.data.cast("B")
        self._parent = self.parents.data.cast("B")
        self._linked = bytearray(block_count)
        self.partial_length = bytearray(block_count)
        # Whether a block's identity covers more than its tokens, for example a picture.
        self._has_extra: npt.NDArray[np.bool_] = np.zeros(block_count, np.bool_)
        self.index = np.zeros(block_count, np.int32)
        self.events: list[CacheEvent] | None = None
        self._hint = np.zeros(block_count, np.int32).data
        self._by_identity = DigestChains(block_count)
        self._by_parent = DigestChains(block_count, self._by_identity.scratch)
        self.native: native.Index | None = None
        if native.accelerator is not None and chain is hashing.chain:
            self.native = self._hold(native.accelerator, block_count)

    def _hold(self, accelerator: native.Accelerator, block_count: int) -> native.Index:
        (heads, following), (parent_heads, parent_following) = self._by_identity.columns, self._by_parent.columns
        index: native.Index = accelerator.Index(
            *(block_count, self._block_size, len(heads)),
            *(self.tokens, self.published, self.identities, self.parents, self._linked, self._has_extra),
            *(self.index, self._hint, heads, following, parent_heads, parent_following),
        )
        return index

    def identity(self, block: int) -> bytes:
        """Returns the 16-byte identity that prompts match, or nothing if there is none."""
        return self._digest(self._identity, block) if self.published[block] == _FULL else b""

    def parent(self, block: int) -> bytes:
        """Returns the identity of the block before one that was published, or the root digest."""
        return self._digest(self._parent, block)

    def block_of(self, identity: bytes) -> int:
        """Returns the block published under `identity`, or 0."""
        for block in self._by_identity.candidates(identity):
            if self._published[block] == _FULL and self._digest(self._identity, block) == identity:
                return block
        return 0

    def blocks_of(self, identities: npt.NDArray[np.uint64]) -> BlockIds:
        """Returns, for each of `identities` (`[row, 2]`), the block published under it, or 0."""
        return self._by_identity.find_many(identities, self.identities, self.published == _FULL)

    def match(
        self, root: bytes, prompt: bytes, extras: Mapping[int, bytes] = NO_EXTRAS, *, learn: bool = True
    ) -> PrefixMatch:
        """Finds the longest known prefix of `prompt` that leaves at least one token to compute.

        Args:
            root: root digest of the sequence.
            prompt: token ids, packed little-endian u32.
            extras: what the identity of some blocks covers beside their tokens, by position of the block.
            learn: keep hints of what follows what; without it nothing changes.
        """
        size = self._block_size
        token_count = len(prompt) // _TOKEN_BYTES
        limit = (token_count - 1) // size
        words = np.frombuffer(prompt, "<u4", limit * size).reshape(limit, size)
        stops = [index for index in sorted(extras) if index < limit]
        path: list[int] = []
        identity = root
        while len(path) < limit:
            stop = next((index for index in stops if index >= len(path)), limit)
            if self.native is not None:
                path += self._follow_natively(self.native, path, root, prompt, stop)
            else:
                self._follow_hints(path, root, words[:stop])
            if path:
                identity = self._digest(self._identity, path[-1])
            if len(path) == limit:
                break
            start = len(path) * size * _TOKEN_BYTES
            block = self._find(identity, prompt[start : start + size * _TOKEN_BYTES], extras.get(len(path), b""))
            if not block:
                break
            if path and learn:
                self._hint[path[-1]] = block
            path.append(block)
            identity = self._digest(self._identity, block)
        return self._with_partial(np.array(path, np.int64) if path else _EMPTY, identity, prompt, extras)

    def match_window(
        self, root: bytes, prompt: bytes, needed: int, extras: Mapping[int, bytes] = NO_EXTRAS
    ) -> PrefixMatch:
        """Finds the longest prefix of full blocks whose last `needed` blocks are known; those before may be gone.

        For attention over a sliding window: what is outside of it is never read. Blocks before the run that was found
        are 0 in the result.
        """
        size = self._block_size
        limit = (len(prompt) // _TOKEN_BYTES - 1) // size
        if not limit:
            return self._with_partial(_EMPTY, root, prompt, extras)
        data = prompt[: limit * size * _TOKEN_BYTES]
        identities = self.chain_tokens(root, data, 0, extras)
        digests = np.frombuffer(b"".join(identities), np.uint64).reshape(-1, 2)
        found = self._by_identity.find_many(digests, self.identities, self.published == _FULL)
        words = np.frombuffer(data, "<u4").reshape(limit, size)
        wrong = (found > 0) & (self.tokens[found] != words).any(axis=1)
        self.collision_count += int(wrong.sum())
        found[wrong] = 0
        run, best = 0, 0
        for position, block in enumerate(found.tolist(), start=1):
            run = run + 1 if block else 0
            if run >= min(needed, position):
                best = position
        blocks = found[:best].copy()
        blocks[: max(0, best - needed)] = 0
        return self._with_partial(blocks, identities[best - 1] if best else root, prompt, extras)

    def _with_partial(
        self, blocks: BlockIds, identity: bytes, prompt: bytes, extras: Mapping[int, bytes]
    ) -> PrefixMatch:
        """Returns `blocks`, the last of which has `identity`, and the block whose head continues them."""
        size = self._block_size
        if len(blocks) in extras:
            return PrefixMatch(blocks, identity, 0, 0)
        left = len(prompt) // _TOKEN_BYTES - 1 - len(blocks) * size
        rest = np.frombuffer(prompt, "<u4", min(size, left), len(blocks) * size * _TOKEN_BYTES)
        partial, count = self._match_partial(identity, rest, is_end=left < size)
        return PrefixMatch(blocks, identity, partial, count)

    def chain(
        self, parent: bytes, blocks: list[int], first: int = 0, extras: Mapping[int, bytes] = NO_EXTRAS
    ) -> list[bytes]:
        """Returns the identities of `blocks`, all full, the first of which follows `parent`.

        Args:
            parent: identity of the block before, or the root digest.
            blocks: block ids.
            first: position of the first in its sequence.
            extras: as in `match`.
        """
        if len(blocks) == 1 and not extras:
            size = self._block_size * _TOKEN_BYTES
            start = blocks[0] * size
            return self._chain(parent, self._token_bytes[start : start + size], self._block_size)
        return self.chain_tokens(parent, self.tokens[blocks].tobytes(), first, extras)

    def chain_tokens(self, parent: bytes, data: bytes, first: int, extras: Mapping[int, bytes]) -> list[bytes]:
        """Returns the identities of the full blocks in `data`, packed token ids; see `chain`."""
        if not extras:
            return self._chain(parent, data, self._block_size)
        return hashing.chain_with(parent, data, self._block_size, first, extras, self._chain)

    def identify(self, fresh: FreshContent) -> list[bytes]:
        """Computes the identities that `fresh` expects, notes them there and returns them."""
        rows = fresh.expected
        stride = self._block_size * _TOKEN_BYTES
        data = self.tokens[[fresh.blocks[row] for row in rows]].tobytes()
        parents = [fresh.parents[row] for row in rows]
        if self._chain is hashing.chain:
            found = hashing.each(parents, data, stride)
        else:
            pieces = [data[start : start + stride] for start in range(0, len(data), stride)]
            found = [
                self._chain(parent, piece, self._block_size)[0] for parent, piece in zip(parents, pieces, strict=True)
            ]
        for row, identity in zip(rows, found, strict=True):
            fresh.identities[row] = identity
        return found

    def publish_full(self, fresh: FreshContent) -> list[tuple[int, int]]:
        """Makes full blocks matchable, in order.

        Returns:
            (block, other): `other` already is published with the same content. `block` is marked DUPLICATE and can be
            published when that one is gone.
        """
        if self.native is not None:
            return self._publish_natively(self.native, fresh)
        blocks, linked = fresh.blocks, self._linked
        rows = np.array(blocks, np.int64)
        digests = np.frombuffer(b"".join(fresh.identities), np.uint64).reshape(-1, 2)
        parents = np.frombuffer(b"".join(fresh.parents), np.uint64).reshape(-1, 2)
        many = len(blocks) >= _MANY and len(set(fresh.identities)) == len(blocks)
        if many:
            self._unlink_many(rows)
        else:
            for block in blocks:
                if linked[block]:
                    self._unlink(block)
        self.identities[rows] = digests
        self.parents[rows] = parents
        self.index[rows] = fresh.indexes
        self._has_extra[rows] = False
        if fresh.with_extra:
            self._has_extra[fresh.with_extra] = True
        duplicates: list[tuple[int, int]] = []
        if many and not self._by_identity.find_many(digests, self.identities, self.published == _FULL).any():
            self._link_many(rows, digests, parents, fresh)
            stored = rows
        else:
            duplicates, done = self._publish_each(fresh)
            stored = rows if done is None else rows[done]
        if self.events is not None and len(stored):
            self.events.append(self.describe(stored))
        return duplicates

    def _publish_natively(self, index: native.Index, fresh: FreshContent) -> list[tuple[int, int]]:
        try:
            duplicates, collision_count, linked = index.publish(
                fresh.blocks, fresh.parents, fresh.identities, fresh.before, fresh.indexes
            )
        except LookupError as error:
            raise InvariantError(str(error)) from None
        self.collision_count += collision_count
        if fresh.with_extra:
            self._has_extra[fresh.with_extra] = True
        if self.events is not None and linked != []:
            stored = fresh.blocks if linked is None else [fresh.blocks[row] for row in linked]
            self.events.append(self.describe(np.array(stored, np.int64)))
        return duplicates

    def publish_partial(self, block: int, parent: bytes, token_count: int) -> bool:
        """Makes the first `token_count` tokens of `block` matchable by copy; false if they already are elsewhere."""
        _, known = self._match_partial(parent, self.tokens[block, :token_count], is_end=True)
        if known == token_count:
            return False
        self._unlink(block)
        self.identities[block] = 0
        self._parent[block * _DIGEST_BYTES : (block + 1) * _DIGEST_BYTES] = parent
        self._has_extra[block] = False
        self._link(block, b"", parent, _PARTIAL)
        self.partial_length[block] = token_count
        return True

    def republish(self, block: int) -> bool:
        """Publishes a DUPLICATE whose other is gone; false if it is not. Called when nobody uses the block any more."""
        identity = self._digest(self._identity, block)
        if self.block_of(identity):
            return False
        self._link(block, identity, self._digest(self._parent, block), _FULL)
        if self.events is not None:
            self.events.append(self.describe(np.array([block])))
        return True

    def forget(self, blocks: BlockIds) -> None:
        """Makes `blocks` match nothing."""
        if self.events is not None:
            full = blocks[self.published[blocks] == _FULL]
            if len(full):
                self.events.append(
                    BlocksRemoved(full, self.index[full].astype(np.int64), self.identities[full].tobytes())
                )
        self.published[blocks] = _NONE

    def clear(self) -> None:
        """Makes every block match nothing."""
        self.published[:] = _NONE
        if self.events is not None:
            self.events.append(CacheCleared())

    def describe(self, blocks: BlockIds, *, with_tokens: bool = True) -> BlocksStored:
        """Returns what is published in `blocks`."""
        return BlocksStored(
            blocks=blocks,
            indexes=self.index[blocks].astype(np.int64),
            identities=self.identities[blocks].tobytes(),
            parents=self.parents[blocks].tobytes(),
            tenant_tags=self._tenants[blocks],
            token_ids=self.tokens[blocks].tobytes() if with_tokens else b"",
            block_size=self._block_size,
        )

    def _publish_each(self, fresh: FreshContent) -> tuple[list[tuple[int, int]], list[int] | None]:
        """Links blocks one by one; returns the duplicates, and which rows were linked if not all were."""
        duplicates: list[tuple[int, int]] = []
        linked: list[int] = []
        rows = zip(fresh.blocks, fresh.parents, fresh.identities, fresh.before, strict=True)
        for row, (block, parent, identity, before) in enumerate(rows):
            other = self.block_of(identity)
            if not other:
                self._link(block, identity, parent, _FULL)
                self._hint[before] = block
                linked.append(row)
            elif np.array_equal(self.tokens[other], self.tokens[block]):
                self._published[block] = _DUPLICATE
                duplicates.append((block, other))
            else:
                self.collision_count += 1
        return duplicates, None if len(linked) == len(fresh.blocks) else linked

    def _link_many(
        self, rows: BlockIds, digests: npt.NDArray[np.uint64], parents: npt.NDArray[np.uint64], fresh: FreshContent
    ) -> None:
        """Links blocks whose identities are new and distinct."""
        self._by_identity.link_many(digests, rows)
        self._by_parent.link_many(parents, rows)
        np.asarray(self._hint)[fresh.before] = rows
        np.frombuffer(self._linked, np.uint8)[rows] = _FULL
        self.published[rows] = _FULL

    def _unlink_many(self, rows: BlockIds) -> None:
        """Takes forgotten blocks out of the chains."""
        linked = np.frombuffer(self._linked, np.uint8)
        states = linked[rows]
        full, any_state = rows[states == _FULL], rows[states != 0]
        if len(full):
            self._by_identity.unlink_many(self.identities[full], full)
        if len(any_state):
            self._by_parent.unlink_many(self.parents[any_state], any_state)
            linked[any_state] = 0

    def _find(self, parent: bytes, tokens: bytes, extra: bytes = b"") -> int:
        """Returns the block that holds `tokens` (one full block) after `parent`, or 0."""
        identity = self._chain(hashing.with_extra(parent, extra), tokens, self._block_size)[0]
        block = self.block_of(identity)
        if block and (self.tokens[block].tobytes() != tokens or bool(self._has_extra[block]) != bool(extra)):
            self.collision_count += 1
            return 0
        return block

    def _follow_natively(
        self, index: native.Index, path: list[int], root: bytes, prompt: bytes, stop: int
    ) -> list[int]:
        """Returns by what the hints extend `path`; see `_follow_hints`."""
        if not path:
            return index.follow(next(self._by_parent.candidates(root), 0), root, prompt, 0, stop)
        return index.follow(self._hint[path[-1]], self._digest(self._identity, path[-1]), prompt, len(path), stop)

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
            good = (self.published[blocks] == _FULL) & ~self._has_extra[blocks]
            good &= (self.tokens[blocks] == words[start : start + len(blocks)]).all(axis=1)
            before = np.frombuffer(root, np.uint64) if not start else self.identities[path[-1]]
            expected = np.concatenate((before[None], self.identities[blocks[:-1]]))
            good &= (self.parents[blocks] == expected).all(axis=1)
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
            if state not in {_FULL, _PARTIAL} or self._has_extra[block] or self._digest(self._parent, block) != parent:
                continue
            length = len(rest)
            if state == _PARTIAL:
                length = min(length, self.partial_length[block])
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
