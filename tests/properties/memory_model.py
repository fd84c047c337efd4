"""What a gateway knows of its tables: the slow side of the comparison with the memory core."""

from __future__ import annotations

import dataclasses
import itertools

from hypothesis import strategies as st

from quire.media import MediaItem

SIZE = 16
USABLE = 9
POOL = "executor"
# Prompts are made of few pieces, shorter and longer than a block, so that they share prefixes of every kind.
# Kinds 3 and 4 are pictures: their tokens are equal, their contents are not.
PIECES = st.lists(st.tuples(st.integers(0, 4), st.sampled_from([16, 16, 8, 19])), min_size=1, max_size=4)
FIRST_PICTURE = 3
PLACEHOLDER = 7777
TENANTS = st.sampled_from(["", "a"])


@dataclasses.dataclass
class ModelTable:
    """A table as its gateway knows it."""

    number: int
    tenant: str
    tokens: list[int]
    contents: list[int]
    written: int
    blocks: list[int]
    copies: list[tuple[int, int]]
    publishes: bool
    confirmed: int = 0
    must_copy: bool = False
    offered: dict[int, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class ModelGateway:
    """A gateway as it knows itself."""

    number: int
    name: str
    tables: dict[int, ModelTable] = dataclasses.field(default_factory=dict)
    leased: list[int] = dataclasses.field(default_factory=list)
    granted: int = 0


def contents_of(pieces: list[tuple[int, int]]) -> list[int]:
    """Returns what the slots of a prompt hold."""
    return [kind * 1000 + position for kind, length in pieces for position in range(length)]


def tokens_of(pieces: list[tuple[int, int]]) -> list[int]:
    """Returns the tokens of a prompt: those of every picture are the same."""
    return [PLACEHOLDER if content >= FIRST_PICTURE * 1000 else content for content in contents_of(pieces)]


def media_of(pieces: list[tuple[int, int]]) -> tuple[MediaItem, ...]:
    """Returns the pictures of a prompt."""
    ends = list(itertools.accumulate(length for _, length in pieces))
    return tuple(
        MediaItem(end - length, length, bytes([kind]) * 16)
        for (kind, length), end in zip(pieces, ends, strict=True)
        if kind >= FIRST_PICTURE
    )
