"""Row 28 of the behaviour of memory: prompts whose placeholder tokens stand for pictures, sounds or films."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from memsvc.sharing.locate import Locator, Query
from memsvc.store import open_store
from quire import hashing
from quire.errors import InvalidRequestError
from quire.media import MediaItem, block_extras
from quire.memory import AdmitRequest
from tests.conformance.memory_connections import POOL_ID, pack, prompt
from tests.conformance.memory_rig import Rig

CAT, DOG = b"c" * 32, b"d" * 32
PLACEHOLDER = 7


def picture(start: int, count: int = 20, digest: bytes = CAT) -> tuple[MediaItem, ...]:
    """Returns one picture."""
    return (MediaItem(start, count, digest),)


def with_picture(start: int, count: int = 20, length: int = 64) -> list[int]:
    """Returns a prompt with placeholders for one picture."""
    return [*prompt(start), *[PLACEHOLDER] * count, *range(900, 900 + length - start - count)]


async def test_row_28_the_same_picture_at_the_same_place_is_shared(rig: Rig) -> None:
    """Otherwise every turn of a conversation about a picture computes the picture again."""
    first = await rig.run(with_picture(20), media=picture(20))
    again = await rig.admit([*with_picture(20), 1], media=picture(20))
    assert again.blocks[:4] == first.blocks
    assert again.admission.cached_token_count == 64


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"media": picture(20, digest=DOG)}, id="other picture"),
        pytest.param({"media": picture(21)}, id="other place"),
        pytest.param({"media": picture(20, 19)}, id="shorter"),
        pytest.param({}, id="none"),
        pytest.param({"media": (*picture(20), *picture(50, 1, DOG))}, id="a second one"),
    ],
)
async def test_row_28_equal_placeholders_of_other_media_share_nothing_from_there_on(
    rig: Rig, other: dict[str, Any]
) -> None:
    """Otherwise a question about one picture is answered from another one."""
    await rig.run(with_picture(20), media=picture(20))
    found = await rig.admit([*with_picture(20), 1], **other)
    shared = 48 if len(other.get("media", ())) > 1 else 16
    assert found.admission.cached_token_count == shared
    assert found.admission.copies == []


async def test_row_28_a_picture_is_not_found_by_a_prompt_without_one(rig: Rig) -> None:
    """Otherwise the placeholders' bare tokens read a picture that was never sent."""
    await rig.run([PLACEHOLDER] * 40)
    found = await rig.admit([PLACEHOLDER] * 41, media=picture(16, 16))
    assert found.admission.cached_token_count == 16
    await found.write()
    await found.close()
    bare = await rig.admit([PLACEHOLDER] * 41)
    assert bare.admission.cached_token_count == 40


async def test_row_28_what_follows_a_picture_depends_on_it(rig: Rig) -> None:
    """Otherwise text after one picture is read as text after another one."""
    await rig.run(with_picture(0, 16), media=picture(0, 16))
    other = await rig.admit([*with_picture(0, 16), 1], media=picture(0, 16, DOG))
    assert other.admission.cached_token_count == 0
    await other.write()
    third = await rig.admit([*with_picture(0, 16), 2], media=picture(0, 16, DOG))
    assert third.blocks[:4] == other.blocks[:4]


async def test_row_28_a_half_filled_block_of_a_picture_is_not_copied_by_its_tokens(rig: Rig) -> None:
    """Otherwise the head of a picture is taken over by whoever has the same placeholders."""
    await rig.run([*prompt(16), *[PLACEHOLDER] * 12], media=picture(16, 12))
    for media in (picture(16, 12, DOG), (), picture(16, 12)):
        found = await rig.admit([*prompt(16), *[PLACEHOLDER] * 12], media=media)
        assert found.admission.cached_token_count == 16
        assert found.admission.copies == []


async def test_row_28_blocks_filled_step_by_step_are_identified_as_those_written_at_once(rig: Rig) -> None:
    """Otherwise a long prompt that was computed in chunks is never found again."""
    tokens, media = with_picture(20), picture(20)
    slow = await rig.admit(tokens, media=media)
    for written in (10, 16, 20, 33, 40, 50, 64):
        await slow.write(written)
    await slow.extend(range(300, 320))
    await slow.close()
    again = await rig.admit([*slow.tokens, 1], media=media)
    assert again.blocks[:5] == slow.blocks[:5]
    memory = rig.core.pool(POOL_ID).memory
    root = rig.core.prefix_root(POOL_ID)
    identities = hashing.chain_with(root, pack(slow.tokens), 16, 0, block_extras(media, 16))
    assert [memory.prefix.identity(block) for block in slow.blocks[:5]] == identities


async def test_row_28_a_pool_is_asked_where_a_prompt_with_a_picture_is(rig: Rig) -> None:
    """Otherwise the router sends the second question about a picture to another executor."""
    await rig.run(with_picture(20), media=picture(20))
    locator = Locator(rig.core, open_store("memory://"), b"s" * 16)
    for media, expected in ((picture(20), 64), (picture(20, digest=DOG), 16), ((), 16)):
        located = await locator.locate(Query(pack([*with_picture(20), 1]), media=media))
        assert [location.token_count for location in located.locations] == [expected]
    with pytest.raises(InvalidRequestError, match="media"):
        await asyncio.wait_for(locator.locate(Query(pack([1]), media=picture(1, 1))), 5)


@pytest.mark.parametrize(
    "media",
    [
        picture(20, 0),
        picture(50, 20),
        picture(20, 2**32 - 1),
        picture(2**32 - 1, 1),
        picture(20, 20, b"short"),
        picture(20, 20, b"x" * 65),
        (*picture(20), *picture(39, 1)),
        (*picture(40, 1), *picture(20, 1)),
    ],
)
async def test_row_28_media_that_cannot_be_are_refused_and_change_nothing(
    rig: Rig, media: tuple[MediaItem, ...]
) -> None:
    """Otherwise what a client sends wrongly decides what is shared."""
    before = rig.state()
    with pytest.raises(InvalidRequestError, match=r"media\[\d\]"):
        await rig.gateway.admit(AdmitRequest(POOL_ID, rig.epoch, "r", 0, pack(with_picture(20)), media=media))
    assert rig.state() == before


def test_extras_are_the_same_on_every_machine() -> None:
    """Otherwise a replica cannot find what another one computed; the bytes are part of the format."""
    extras = block_extras((MediaItem(10, 10, CAT), MediaItem(20, 1, DOG)), 16)
    assert sorted(extras) == [0, 1]
    assert extras[0].hex() == "20000000" + CAT.hex() + "0a00000000000000" + "0a000000"
    assert extras[1].hex() == (
        "20000000"
        + CAT.hex()
        + "faffffffffffffff"
        + "0a000000"
        + "20000000"
        + DOG.hex()
        + "0400000000000000"
        + "01000000"
    )
