"""Media items: runs of placeholder tokens that stand for a picture, a sound or a film.

The placeholders of two pictures are equal, their keys and values are not. So the identity of every block that an item
touches covers, beside the tokens, which item it is and where in the block it lies (`block_extras`).
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import struct

from quire.errors import InvalidRequestError

DIGEST_BYTES_MINIMUM, DIGEST_BYTES_MAXIMUM = 16, 64


@dataclasses.dataclass(frozen=True, slots=True)
class MediaItem:
    """One item; see `quire.memsvc.v1.MediaItem`."""

    start: int
    """Position of its first placeholder in the tokens."""
    token_count: int
    """How many placeholders it has; at least one."""
    digest: bytes
    """Digest of its content, 16 .. 64 bytes."""


def check(media: Sequence[MediaItem], token_count: int) -> None:
    """Raises InvalidRequestError unless the items lie within `token_count` tokens, in order, and do not overlap."""
    end = 0
    for index, item in enumerate(media):
        length = len(item.digest)
        if not DIGEST_BYTES_MINIMUM <= length <= DIGEST_BYTES_MAXIMUM:
            message = (
                f"media[{index}].digest: {length} bytes, allowed are {DIGEST_BYTES_MINIMUM} .. {DIGEST_BYTES_MAXIMUM}"
            )
            raise InvalidRequestError(message, field="media.digest")
        if item.start < end:
            message = f"media[{index}].start: found {item.start}, the item before ends at {end}"
            raise InvalidRequestError(message, field="media.start")
        end = item.start + item.token_count
        if item.token_count < 1 or end > token_count:
            message = (
                f"media[{index}].token_count: found {item.token_count} from token {item.start} on, at least 1 is "
                f"expected and there are {token_count} tokens"
            )
            raise InvalidRequestError(message, field="media.token_count")


def block_extras(media: Sequence[MediaItem], block_size: int) -> dict[int, bytes]:
    """Returns what the identity of each block that an item touches covers beside its tokens, by position of the block.

    For each item that touches the block, in order: the length of its digest as u32, the digest, the item's start less
    the block's as i64, and its token count as u32, all little-endian. The same on every process.
    """
    extras: dict[int, bytes] = {}
    for item in media:
        for index in range(item.start // block_size, (item.start + item.token_count - 1) // block_size + 1):
            place = struct.pack("<qI", item.start - index * block_size, item.token_count)
            part = struct.pack("<I", len(item.digest)) + item.digest + place
            extras[index] = extras.get(index, b"") + part
    return extras
