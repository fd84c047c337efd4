"""Row 35 of the behaviour of memory: of equal prompts that come at once the second is charged only its rest."""

from __future__ import annotations

import pytest

from quire.errors import PrefixPendingError
from quire.memory import CloseReason
from tests.conformance.memory_connections import prompt
from tests.conformance.memory_rig import Rig


async def test_row_35_who_waits_for_an_equal_prompt_is_charged_only_the_remainder(rig: Rig) -> None:
    """Otherwise a thousand users who ask one thing at once compute and hold it a thousand times."""
    first = await rig.admit(prompt(70))
    before = rig.state()
    with pytest.raises(PrefixPendingError, match="64 tokens behind 0") as caught:
        await rig.admit([*prompt(70), 5], wait_for_prefix=True)
    assert caught.value.metadata == {"table": str(first.table), "token_count": "64", "cached_token_count": "0"}
    assert rig.state() == before
    await first.write(40)
    with pytest.raises(PrefixPendingError, match="32 tokens behind 32"):
        await rig.admit([*prompt(70), 5], wait_for_prefix=True)
    await first.write(64)
    second = await rig.admit([*prompt(70), 5], wait_for_prefix=True)
    assert second.admission.cached_token_count == 64
    assert second.blocks[:4] == first.blocks[:4]
    assert (await rig.pool()).used_block_count == 6


async def test_row_35_who_does_not_wait_is_told_what_it_computes_twice_and_its_blocks_become_one(rig: Rig) -> None:
    """Otherwise a gateway cannot tell that waiting would have been cheaper, and the copies stay."""
    first = await rig.admit(prompt(70))
    second = await rig.admit(prompt(70))
    assert (second.admission.cached_token_count, second.admission.pending_token_count) == (0, 64)
    await first.write()
    await second.write()
    for _, index, block in await rig.merged():
        await second.replace(index, block)
    assert second.blocks[:4] == first.blocks[:4]
    assert (await rig.pool()).used_block_count == 6


@pytest.mark.parametrize("end", ["failed", "preempted", "gone"])
async def test_row_35_nobody_waits_for_a_sequence_that_has_ended(rig: Rig, end: str) -> None:
    """Otherwise a request waits for what never comes."""
    other = rig.connect_raw("gateway-1")
    await other.start()  # type: ignore[attr-defined]
    first = await rig.admit(prompt(70), other)
    await first.write(20)
    if end == "gone":
        await other.close()
    else:
        await first.close(CloseReason.FAILED if end == "failed" else CloseReason.PREEMPTED)
    second = await rig.admit(prompt(70), wait_for_prefix=True)
    assert second.admission.pending_token_count == 0


@pytest.mark.parametrize(
    ("tokens", "fields"),
    [
        (prompt(16), {}),
        ([*prompt(10), *prompt(40, seed=2)], {}),
        (prompt(70), {"tenant": "other"}),
        (prompt(70), {"cache_salt": "other"}),
        (prompt(70), {"skip_cache_read": True}),
        (prompt(70, seed=3), {}),
    ],
)
async def test_row_35_nobody_waits_for_what_it_could_not_use(
    rig: Rig, tokens: list[int], fields: dict[str, object]
) -> None:
    """Otherwise a request is held up for another's prompt, or a tenant learns what another one asks."""
    await rig.admit(prompt(70))
    second = await rig.admit(tokens, wait_for_prefix=True, **fields)
    assert second.admission.pending_token_count == 0


async def test_row_35_what_a_sequence_keeps_out_of_the_cache_is_not_waited_for(rig: Rig) -> None:
    """Otherwise a request waits for blocks that never match."""
    await rig.admit(prompt(70), skip_cache_write=True)
    assert (await rig.admit(prompt(70), wait_for_prefix=True)).admission.pending_token_count == 0


async def test_row_35_a_common_beginning_is_waited_for_as_far_as_it_goes(rig: Rig) -> None:
    """Otherwise requests with one system prompt and other questions compute it again and again."""
    first = await rig.admit(prompt(70))
    with pytest.raises(PrefixPendingError) as caught:
        await rig.admit([*prompt(40), *prompt(40, seed=2)], wait_for_prefix=True)
    assert caught.value.metadata["token_count"] == "32"
    await first.write(32)
    second = await rig.admit([*prompt(40), *prompt(40, seed=2)], wait_for_prefix=True)
    assert second.admission.cached_token_count == 32
