"""What the prefix index is told and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import enum
from types import MappingProxyType

from memsvc.core.free_order import BlockIds

NO_EXTRAS: Mapping[int, bytes] = MappingProxyType({})


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


@dataclasses.dataclass(frozen=True, slots=True)
class PrefixMatch:
    """The longest known prefix of a prompt."""

    blocks: BlockIds
    """Blocks that hold the leading full blocks of the prompt, 0 for those outside a sliding window."""
    identity: bytes
    """Identity of the last of them, or the root digest."""
    partial_block: int
    """Block whose head continues the prompt, to be copied; 0 for none."""
    partial_token_count: int
    """Tokens of the prompt that are in `partial_block`."""

    @property
    def found(self) -> BlockIds:
        """`blocks` without the leading null ones, which are outside a sliding window."""
        return self.blocks if not len(self.blocks) or self.blocks[0] else self.blocks[self.blocks > 0]


@dataclasses.dataclass(slots=True)
class FreshContent:
    """Blocks that became full and written, in columns.

    Blocks that are `expect`ed have no identity until `PrefixIndex.identify` has computed all of them.
    """

    blocks: list[int] = dataclasses.field(default_factory=list)
    parents: list[bytes] = dataclasses.field(default_factory=list)
    """Identity of the block before each, or the root digest."""
    identities: list[bytes] = dataclasses.field(default_factory=list)
    """Of each block."""
    before: list[int] = dataclasses.field(default_factory=list)
    """The block before each in its table, 0 for none."""
    indexes: list[int] = dataclasses.field(default_factory=list)
    """Position of each block in its table."""
    expected: list[int] = dataclasses.field(default_factory=list)
    """Rows that have no identity yet."""
    with_extra: list[int] = dataclasses.field(default_factory=list)
    """Those of `blocks` whose identity covers more than tokens."""

    def add(self, blocks: list[int], parent: bytes, identities: list[bytes], before: int, index: int = 0) -> None:
        """Adds blocks that follow one another.

        Args:
            blocks: block ids.
            parent: identity of the block before the first, or the root digest.
            identities: of each block.
            before: block before the first, 0 for none.
            index: position of the first in its table.
        """
        self.blocks += blocks
        self.identities += identities
        self.parents += [parent, *identities[:-1]]
        self.before += [before, *blocks[:-1]]
        self.indexes += range(index, index + len(blocks))

    def expect(self, block: int, parent: bytes, before: int, index: int) -> None:
        """Adds one block whose identity is still to be computed; the arguments are those of `add`."""
        self.expected.append(len(self.blocks))
        self.blocks.append(block)
        self.parents.append(parent)
        self.identities.append(b"")
        self.before.append(before)
        self.indexes.append(index)
