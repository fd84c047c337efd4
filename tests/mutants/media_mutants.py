"""The rules of what media items do to sharing, each taken out once, and the scenario that notices."""

from __future__ import annotations

from typing import Final

from tests.mutants.mutation import Mutant

_MEMORY: Final = "memsvc.core.pool_memory:PoolMemory"
_WRITER: Final = "memsvc.core.writer:JournalWriter"

MEDIA: Final = (
    Mutant(
        "the identity of a block does not cover the pictures in it",
        f"{_WRITER}._commit",
        "memory.prefix.chain(record.parent, blocks, start, record.extras)",
        "memory.prefix.chain(record.parent, blocks)",
        "media_are_part_of_what_is_shared",
    ),
    Mutant(
        "a block that fills in one step leaves its pictures out",
        f"{_WRITER}._commit",
        "end == start + 1 and not record.extras",
        "end == start + 1",
        "media_are_part_of_what_is_shared",
    ),
    Mutant(
        "a prompt is looked up without its pictures",
        f"{_MEMORY}._match",
        "self.prefix.match(root, request.token_ids, extras, learn=learn)",
        "self.prefix.match(root, request.token_ids, learn=learn)",
        "media_are_part_of_what_is_shared",
    ),
    Mutant(
        "the head of a picture is matched by its placeholders",
        f"{_MEMORY}._publish_tail",
        "plain = index not in record.extras",
        "plain = True",
        "media_are_part_of_what_is_shared",
    ),
    Mutant(
        "a picture takes over a part of a block without one",
        "memsvc.core.prefix:PrefixIndex._with_partial",
        "if len(blocks) in extras:",
        "if False:",
        "media_are_part_of_what_is_shared",
    ),
    Mutant(
        "a picture is known by its content, wherever it lies",
        "quire.media:block_extras",
        "item.start - index * block_size",
        "0",
        "media_are_part_of_what_is_shared",
    ),
    Mutant(
        "two pictures may claim the same placeholders",
        "quire.media:check",
        "if item.start < end:",
        "if False:",
        "media_are_part_of_what_is_shared",
    ),
)
