"""Rows 33, 34, 56, 71, 72 and 74 of the behaviour of memory: journals, leases, and messages that do not fit."""

from __future__ import annotations

from typing import Any

import pytest

from quire.errors import InvalidRequestError, PoolNotFoundError, QuireError, StaleEpochError
from quire.memory import AdmitRequest, BlocksRecalled, CloseReason, JournalEntry
from tests.conformance.memory_connections import POOL_ID, StreamConnection, pack, prompt, spec
from tests.conformance.memory_rig import Rig, RigSequence, grpc_rig


async def test_row_33_closing_a_table_twice_does_nothing_more(rig: Rig) -> None:
    """Otherwise a repeated message frees blocks that others hold."""
    sequence = await rig.run(prompt(40))
    before = rig.state()
    await sequence.close()
    await sequence.write()
    assert rig.state() == before


async def test_row_34_closing_before_anything_is_written_leaves_no_trace(rig: Rig) -> None:
    """Otherwise requests that are cancelled early use up the pool."""
    sequence = await rig.admit(prompt(100))
    await sequence.close(CloseReason.CANCELLED)
    pool = await rig.pool()
    assert (pool.free_block_count, pool.cached_block_count, pool.sequence_count) == (32, 0, 0)


async def test_row_71_an_admission_or_lease_of_another_epoch_is_refused_and_changes_nothing(rig: Rig) -> None:
    """Otherwise a gateway that slept through a restart is granted blocks of another life."""
    before = rig.state()
    for epoch in (rig.epoch - 1, rig.epoch + 1):
        with pytest.raises(StaleEpochError):
            await rig.admit(prompt(16), epoch=epoch)
        with pytest.raises(StaleEpochError):
            await rig.gateway.lease(POOL_ID, epoch, 4)
    assert rig.state() == before


async def test_row_71_a_journal_of_an_epoch_that_is_over_changes_nothing(rig: Rig) -> None:
    """Otherwise a late journal writes into tables of the new epoch."""
    sequence = await rig.admit(prompt(16))
    before = rig.state()
    await rig.journal(epoch=rig.epoch - 1, closed=[sequence.table], close_reasons=[1])
    assert rig.state() == before


async def test_row_72_a_lease_request_repeated_grants_nothing_more(rig: Rig) -> None:
    """Otherwise a retry leaks blocks."""
    first = await rig.gateway.lease(POOL_ID, rig.epoch, 5)
    assert len(first) == 5
    assert await rig.gateway.lease(POOL_ID, rig.epoch, 5) == []
    assert await rig.gateway.lease(POOL_ID, rig.epoch, 3) == []
    assert len(await rig.gateway.lease(POOL_ID, rig.epoch, 7)) == 2
    assert (await rig.pool()).leased_block_count == 7


async def test_a_lease_grants_what_there_is_when_the_pool_is_short(rig: Rig) -> None:
    """Otherwise a gateway waits for blocks that do not come."""
    assert len(await rig.lease(100)) == 32
    assert await rig.lease(1) == []


async def test_row_72_growth_and_tokens_told_twice_count_once(rig: Rig) -> None:
    """Otherwise a repeated step makes a table grow, or a token appear twice."""
    sequence = await rig.admit(prompt(16))
    (block,) = await rig.lease(1)
    fields: dict[str, Any] = {
        "tables": [sequence.table],
        "token_starts": [16],
        "token_counts": [1],
        "token_ids": [5],
        "written_counts": [16],
        "appended": [sequence.table, 1, block],
    }
    await rig.journal(**fields)
    before = rig.state()
    await rig.journal(**fields)
    assert rig.state() == before


async def test_rows_of_one_table_in_one_journal_follow_one_another(rig: Rig) -> None:
    """Otherwise a gateway cannot join the news of two steps."""
    sequence = await rig.admit(prompt(10))
    await rig.journal(
        tables=[sequence.table, sequence.table],
        token_starts=[10, 12],
        token_counts=[2, 1],
        token_ids=[1, 2, 3],
        written_counts=[10, 13],
    )
    memory = rig.core.pool(POOL_ID).memory
    slot = memory.tables.slot(sequence.table)
    assert (memory.tables.tokens[slot], memory.tables.written[slot]) == (13, 13)


async def test_the_last_sampled_token_needs_no_block(rig: Rig) -> None:
    """Otherwise a sequence that ends at a block's edge takes a block that it never writes."""
    sequence = await rig.admit(prompt(16))
    await rig.journal(tables=[sequence.table], token_starts=[16], token_counts=[1], token_ids=[5], written_counts=[16])
    assert (await rig.pool()).used_block_count == 1
    (block,) = await rig.lease(1)
    sequence.tokens.append(5)
    sequence.blocks.append(block)
    await rig.journal(appended=[sequence.table, 1, block])
    await sequence.extend([6])
    await sequence.close()
    again = await rig.admit([*prompt(16), 5, 6, 7])
    assert again.admission.cached_token_count == 18
    assert (await rig.admit([*prompt(16), 5, 6])).admission.cached_token_count == 17


BAD_JOURNALS: dict[str, dict[str, Any]] = {
    "rows of unequal length": {"tables": ["t"], "token_starts": [], "token_counts": [0], "written_counts": [16]},
    "more tokens than the rows say": {
        "tables": ["t"],
        "token_starts": [20],
        "token_counts": [0],
        "written_counts": [16],
        "token_ids": [1],
    },
    "reasons missing": {"closed": ["t"], "close_reasons": []},
    "a reason that is none": {"closed": ["t"], "close_reasons": [9]},
    "an unknown table": {"tables": [99], "token_starts": [0], "token_counts": [0], "written_counts": [0]},
    "an unknown table closed": {"closed": [99], "close_reasons": [1]},
    "a gap": {"tables": ["t"], "token_starts": [22], "token_counts": [1], "token_ids": [1], "written_counts": [16]},
    "other tokens than known": {
        "tables": ["t"],
        "token_starts": [19],
        "token_counts": [1],
        "token_ids": [77],
        "written_counts": [16],
    },
    "written more than known": {"tables": ["t"], "token_starts": [20], "token_counts": [0], "written_counts": [21]},
    "written falls": {"tables": ["t"], "token_starts": [20], "token_counts": [0], "written_counts": [15]},
    "a count that overflows": {
        "tables": ["t"],
        "token_starts": [2**32 - 1],
        "token_counts": [1],
        "token_ids": [1],
        "written_counts": [16],
    },
    "a block that was not leased": {"appended": ["t", 2, 20]},
    "the null block": {"appended": ["t", 2, 0]},
    "a block outside the pool": {"appended": ["t", 2, 2**32 - 1]},
    "a block twice": {"appended": ["t", 2, "l", "t", 3, "l"]},
    "a gap in the table": {"appended": ["t", 3, "l"]},
    "another block where one is": {"appended": ["t", 1, "l"]},
    "a block returned that was not leased": {"returned": [20]},
    "a block returned twice": {"returned": ["l", "l"]},
    "a block of a table returned": {"returned": ["b"]},
    "a block appended and returned": {"appended": ["t", 2, "l"], "returned": ["l"]},
}


@pytest.mark.parametrize("name", BAD_JOURNALS)
async def test_a_journal_that_does_not_fit_is_refused_as_a_whole(rig: Rig, name: str) -> None:
    """Otherwise half of a bad message corrupts the pool."""
    sequence = await rig.admit(prompt(20))
    await sequence.write(16)
    (leased,) = await rig.lease(1)
    names = {"t": sequence.table, "l": leased, "b": sequence.blocks[0]}
    fields = {key: [names.get(value, value) for value in column] for key, column in BAD_JOURNALS[name].items()}
    before = rig.state()
    with pytest.raises((InvalidRequestError, StaleEpochError)) as caught:
        await rig.journal(**fields)
    assert caught.value.code.name in {"INVALID_ARGUMENT", "ABORTED"}
    assert rig.state() == before


@pytest.mark.parametrize(
    "fields",
    [
        {"token_ids": b""},
        {"token_ids": b"abc"},
        {"request_id": ""},
        {"request_id": "r" * 600},
        {"tenant": "t" * 600},
        {"cache_salt": "s" * 600},
    ],
)
async def test_an_admission_that_cannot_be_is_refused(rig: Rig, fields: dict[str, Any]) -> None:
    """Otherwise garbage of one gateway becomes everybody's."""
    before = rig.state()
    request: dict[str, Any] = {"request_id": "r", "token_ids": pack([1]), **fields}
    with pytest.raises(InvalidRequestError):
        await rig.gateway.admit(AdmitRequest(POOL_ID, rig.epoch, sample_index=0, **request))
    assert rig.state() == before


async def test_an_unknown_pool_is_not_found(rig: Rig) -> None:
    """Otherwise a misspelt pool is an internal error."""
    with pytest.raises(PoolNotFoundError):
        await rig.gateway.admit(AdmitRequest("other", 1, "r", 0, pack([1])))
    with pytest.raises(PoolNotFoundError):
        await rig.gateway.lease("other", 1, 1)


async def test_a_shortage_recalls_unused_leases(rig: Rig) -> None:
    """Otherwise idle leases starve new requests."""
    blocks = await rig.lease(30)
    with pytest.raises(QuireError, match="5 blocks are needed and 2 are available"):
        await rig.admit(prompt(80))
    if isinstance(rig.gateway, StreamConnection):
        await rig.gateway.ping()
    recalls = [event for event in rig.gateway.events if isinstance(event, BlocksRecalled)]
    assert [(recall.pool_id, recall.block_count) for recall in recalls] == [(POOL_ID, 3)]
    await rig.journal(returned=blocks[:3])
    await rig.admit(prompt(80))


async def test_a_request_number_repeated_repeats_the_answer() -> None:
    """Otherwise a retry opens a second table."""
    async with grpc_rig(spec()) as rig:
        gateway = rig.gateway
        assert isinstance(gateway, StreamConnection)
        request = AdmitRequest(POOL_ID, rig.epoch, "r", 0, pack(prompt(20)))
        first = await gateway.answered(77, request)
        before = rig.state()
        assert await gateway.answered(77, request) == first
        assert rig.state() == before


async def test_row_72_a_journal_number_repeated_is_acknowledged_and_a_missing_one_is_not() -> None:
    """Otherwise a repeated journal counts twice, or a lost one goes unnoticed."""
    async with grpc_rig(spec()) as rig:
        gateway = rig.gateway
        assert isinstance(gateway, StreamConnection)
        sequence = await rig.admit(prompt(20))
        await gateway.send_journal(1, JournalEntry(POOL_ID, rig.epoch, closed=[sequence.table], close_reasons=[1]))
        other = await rig.admit(prompt(20))
        await gateway.send_journal(1, JournalEntry(POOL_ID, rig.epoch, closed=[other.table], close_reasons=[1]))
        assert (await rig.pool()).sequence_count == 1
        with pytest.raises(StaleEpochError, match="expected 2"):
            await gateway.send_journal(3, JournalEntry(POOL_ID, rig.epoch))


async def test_a_gateway_cannot_touch_what_another_one_holds() -> None:
    """Otherwise a confused gateway frees its neighbour's blocks."""
    async with grpc_rig(spec()) as rig:
        sequence: RigSequence = await rig.admit(prompt(20))
        (leased,) = await rig.lease(1)
        for fields in (
            {"closed": [sequence.table], "close_reasons": [1]},
            {"returned": [leased]},
            {"tables": [sequence.table], "token_starts": [20], "token_counts": [0], "written_counts": [20]},
            {"appended": [sequence.table, 2, leased]},
        ):
            intruder = rig.connect_raw("intruder")
            assert isinstance(intruder, StreamConnection)
            await intruder.start()
            before = rig.state()
            with pytest.raises(StaleEpochError):
                await rig.journal(intruder, **fields)
            assert rig.state()[:-2] == before[:-2]
