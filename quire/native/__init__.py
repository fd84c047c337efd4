"""The accelerator of the memory core: hashing, publication, and journals of the usual kind, in C.

It is optional. Where it was not built (there was no C compiler), or with QUIRE_NATIVE=off, Python does the same,
several times slower. It has no rule of its own: what is not of the usual kind it declines, having changed nothing, and
Python says what it means or what is wrong with it. The columns it works on are those of the core, which stay the only
state.

Attributes:
    accelerator: the extension, or None to do without. Read whenever a pool is made or something is hashed.
    reason: why there is none; empty if there is one.
"""

from __future__ import annotations

import importlib
import os
from typing import Any, Protocol, cast

OFF = "off"


class Blocks(Protocol):
    """Columns of `memsvc.core.pool.BlockPool`, held."""

    def take(self, blocks: object, now: float, lessee: int, /) -> None:
        """Gives `blocks` a new life, leased if there is a lessee. Raises IndexError."""

    def drop(self, blocks: object, reusable: object, now: float, /) -> tuple[int, bytes, bytes] | None:
        """Removes a reference from each of `blocks` (distinct) and returns what fell back, in order.

        Returns:
            How many of those were pending, the blank blocks and the cached ones (packed int64); or None, with nothing
            changed, if a block has no reference.

        Raises:
            IndexError, ValueError: no such block; columns of different length; a block is given twice.
        """


class Index(Protocol):
    """Columns of `memsvc.core.prefix.PrefixIndex`, held."""

    def publish(
        self,
        blocks: list[int],
        parents: list[bytes],
        identities: list[bytes],
        before: list[int],
        indexes: list[int],
        /,
    ) -> tuple[list[tuple[int, int]], int, list[int] | None]:
        """Publishes full blocks; see `PrefixIndex.publish_full`.

        Returns:
            The duplicates, how many identities had other tokens, and the rows that were linked: None for all.

        Raises:
            ValueError: a row is not a block; nothing was changed.
            LookupError: a block is not in the chain that it should be in: the columns are broken.
        """

    def chain(self, parent: bytes, blocks: list[int], /) -> list[bytes]:
        """Returns the identities of full `blocks`, the first of which follows `parent`. Raises IndexError."""

    def follow(self, block: int, before: bytes, words: object, start: int, stop: int, /) -> list[int]:
        """Returns the blocks that hints lead to, from `block` on, as far as they hold the tokens of `words`.

        Args:
            block: where to begin.
            before: identity of the block before it, or the root digest.
            words: packed u32 tokens.
            start: block of `words` that `block` may hold.
            stop: block of `words` to stop before.
        """


class Tables(Protocol):
    """Columns of `memsvc.core.table.TableColumns`, held."""

    def apply(
        self,
        blocks: Blocks,
        index: Index,
        gateway: int,
        now: float,
        token_limit: int,
        block_limit: int,
        /,
        *columns: Any,
    ) -> tuple[Any, ...] | None:
        """Applies the rows and the growth of a journal of the usual kind.

        Args:
            blocks: what grows.
            index: where the tokens go.
            gateway: number of the gateway whose journal it is.
            now: the caller's clock.
            token_limit: most tokens of a table.
            block_limit: most blocks of a table.
            columns: tables, token_starts, token_counts, written_counts, token_ids, appended: int64, u32, or packed u32.

        Returns:
            By how many blocks tables grew, and what is to be published: the fields of
            `memsvc.core.content.FreshContent` up to `indexes`. None if the journal was declined: nothing has changed.
        """


class Accelerator(Protocol):
    """The extension."""

    Blocks: Any
    """Makes `Blocks`."""
    Index: Any
    """Makes an `Index`."""
    Tables: Any
    """Makes `Tables`."""

    def chain(self, parent: bytes, data: object, stride: int, /) -> list[bytes]:
        """See `quire.hashing.chain`."""

    def each(self, parents: list[bytes], data: object, stride: int, /) -> list[bytes]:
        """See `quire.hashing.each`."""


def _load() -> tuple[Accelerator | None, str]:
    if os.environ.get("QUIRE_NATIVE") == OFF:
        return None, f"QUIRE_NATIVE={OFF}"
    try:
        return cast("Accelerator", importlib.import_module("quire.native._accelerator")), ""
    except ImportError as error:
        return None, str(error)


accelerator, reason = _load()
