"""What operators see: pages, names, and what is not there."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from protos.memsvc.v1 import admin_pb2
from quire.errors import BlockNotFoundError, InvalidRequestError, PoolNotFoundError, SequenceNotFoundError
from tests.conformance.memory_connections import POOL_ID, prompt
from tests.conformance.memory_rig import Rig


async def test_sequences_are_listed_oldest_first_page_by_page(rig: Rig) -> None:
    """Otherwise a large service cannot be looked at."""
    for index in range(5):
        await rig.admit(prompt(17, index), request_id=f"r{index}", tenant="t")
    seen, token = [], ""
    while True:
        request = admin_pb2.ListSequencesRequest(pool_id=POOL_ID, page_size=2, page_token=token)
        page = await rig.admin.ListSequences(request)
        seen += [sequence.sequence_id for sequence in page.sequences]
        token = page.next_page_token
        if not token:
            break
        assert len(page.sequences) == 2
    assert seen == [f"r{index}/0" for index in range(5)]
    assert page.sequences[0].gateway_id == "gateway-0"
    assert page.sequences[0].tenant == "t"


async def test_a_block_table_is_shown_page_by_page(rig: Rig) -> None:
    """Otherwise an operator cannot see where a long sequence is."""
    sequence = await rig.admit(prompt(100), request_id="long")
    await sequence.write(70)
    first = await rig.admin.GetBlockTable(admin_pb2.GetBlockTableRequest(sequence_id="long", page_size=5))
    rest = await rig.admin.GetBlockTable(
        admin_pb2.GetBlockTableRequest(sequence_id="long/0", page_token=first.next_page_token)
    )
    entries = [*first.entries, *rest.entries]
    assert [entry.block_id for entry in entries] == sequence.blocks
    assert [entry.written_token_count for entry in entries] == [16, 16, 16, 16, 6, 0, 0]
    assert [len(entry.identity) for entry in entries] == [16, 16, 16, 16, 0, 0, 0]
    assert {entry.ref_count for entry in entries} == {1}
    assert {entry.generation for entry in entries} == {1}
    summary = first.sequence
    assert (summary.token_count, summary.written_token_count, summary.committed_token_count) == (100, 70, 64)
    assert (summary.block_count, summary.state, rest.next_page_token) == (7, admin_pb2.SEQUENCE_STATE_OPEN, "")


async def test_a_sequence_is_found_by_the_beginning_of_its_name_if_only_one_begins_so(rig: Rig) -> None:
    """Otherwise operators type thirty-two characters, or look at the wrong sequence."""
    await rig.admit(prompt(10), request_id="abc-1")
    await rig.admit(prompt(10), request_id="abd-2")
    found = await rig.admin.GetBlockTable(admin_pb2.GetBlockTableRequest(sequence_id="abc"))
    assert found.sequence.sequence_id == "abc-1/0"
    with pytest.raises(InvalidRequestError, match="begins 2 sequences"):
        await rig.admin.GetBlockTable(admin_pb2.GetBlockTableRequest(sequence_id="ab"))


@pytest.mark.parametrize("name", ["", "nothing", "x" * 5000])
async def test_an_unknown_sequence_is_not_found(rig: Rig, name: str) -> None:
    """Otherwise a typing error is an internal error."""
    with pytest.raises(SequenceNotFoundError):
        await rig.admin.GetBlockTable(admin_pb2.GetBlockTableRequest(sequence_id=name))


async def test_unknown_pools_and_blocks_are_named(rig: Rig) -> None:
    """Otherwise a typing error is an internal error."""
    with pytest.raises(PoolNotFoundError, match="known are executor-0"):
        await rig.admin.GetPool(admin_pb2.GetPoolRequest(pool_id="x"))
    with pytest.raises(PoolNotFoundError):
        await rig.admin.ListSequences(admin_pb2.ListSequencesRequest(pool_id="x"))
    with pytest.raises(PoolNotFoundError):
        await rig.admin.GetBlock(admin_pb2.GetBlockRequest(pool_id="x"))
    with pytest.raises(BlockNotFoundError, match=r"0 \.\. 32"):
        await rig.admin.GetBlock(admin_pb2.GetBlockRequest(pool_id=POOL_ID, block_id=33))


@pytest.mark.parametrize("token", ["x", "!!!!", "cG9vbHM6YQ==", "c2VxdWVuY2VzOi0x", "A" * 100_000, "c2VxdWVuY2VzOmFi"])
async def test_a_page_token_of_something_else_is_refused(rig: Rig, token: str) -> None:
    """Otherwise a client that mixes up its tokens gets the wrong page."""
    with pytest.raises(InvalidRequestError, match="page_token"):
        await rig.admin.ListSequences(admin_pb2.ListSequencesRequest(page_token=token))


async def test_pools_are_listed_and_page_sizes_are_bounded(rig: Rig) -> None:
    """Otherwise one call returns everything."""
    pools = await rig.admin.ListPools(admin_pb2.ListPoolsRequest(page_size=2**32 - 1))
    assert [pool.pool_id for pool in pools.pools] == [POOL_ID]
    assert pools.next_page_token == ""


async def test_every_state_of_a_block_is_explained(rig: Rig) -> None:
    """Otherwise nobody can tell why memory is full."""
    await rig.run(prompt(20))
    running = await rig.admit([*prompt(16), 8, 8, 8], request_id="shares")
    (leased,) = await rig.lease(1)
    blocks = {index: await rig.block(index) for index in (0, 1, 2, leased, 32)}
    assert blocks[0].state == admin_pb2.BLOCK_STATE_NULL
    assert list(blocks[1].sequence_ids) == ["shares/0"]
    assert blocks[1].state == admin_pb2.BLOCK_STATE_USED
    assert blocks[2].state == admin_pb2.BLOCK_STATE_CACHED
    assert "first 4 tokens can be matched" in blocks[2].explanation
    assert blocks[leased].leased_to == "gateway-0"
    assert blocks[32].state == admin_pb2.BLOCK_STATE_FREE
    assert blocks[32].generation == 0
    assert running.blocks[0] == 1


async def test_answers_are_consistent_while_the_pool_changes(rig: Rig) -> None:
    """Otherwise counts do not add up when it matters."""

    async def churn() -> None:
        for seed in range(30):
            await rig.run(prompt(50, seed))
            await asyncio.sleep(0)

    async def look() -> list[Any]:
        return [await rig.pool() for _ in range(30)]

    _, pools = await asyncio.gather(churn(), look())
    assert len(pools) == 30
