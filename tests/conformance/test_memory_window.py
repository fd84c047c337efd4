"""Rows 43, 54 and 55 of the behaviour of memory: pools of models that attend over a sliding window."""

from __future__ import annotations

from collections.abc import AsyncIterator
import dataclasses
from typing import Any

import grpc
import pytest
import pytest_asyncio

from memsvc.core.pool import BlockState
from protos.memsvc.v1 import admin_pb2, memsvc_pb2, memsvc_pb2_grpc
from quire.errors import BlockPoolExhaustedError, PromptTooLongError, StaleEpochError
from quire.memory import AdmitRequest, CloseReason, PoolSpec
from quire.rpc import open_channel
from tests.conformance.conftest import OpenRig
from tests.conformance.memory_connections import POOL_ID, pack, prompt, spec
from tests.conformance.memory_rig import Rig, RigSequence, grpc_rig

WINDOW = 40
# 39 tokens before the one that is computed span 3 blocks at most, when it is the first of its own.
HIT = 3


def window_spec(usable: int = 32, window: int = WINDOW, max_model_len: int = 4096) -> PoolSpec:
    """Returns a pool whose sequences attend over `window` positions."""
    return dataclasses.replace(spec(usable, max_model_len=max_model_len), sliding_window=window)


@pytest_asyncio.fixture
async def window_rig(open_rig: OpenRig) -> AsyncIterator[Rig]:
    """A memory service with 32 blocks of 16 tokens and a window of 40 tokens."""
    async with open_rig(window_spec()) as opened:
        yield opened


async def entries(rig: Rig, sequence: RigSequence) -> list[int]:
    """Returns the block table as operators see it."""
    name = (
        rig.core.pool(POOL_ID)
        .memory.tables.record(rig.core.pool(POOL_ID).memory.tables.slot(sequence.table))
        .sequence_id
    )
    found = await rig.admin.GetBlockTable(admin_pb2.GetBlockTableRequest(sequence_id=name))
    assert [entry.index for entry in found.entries] == list(range(len(found.entries)))
    return [entry.block_id for entry in found.entries]


async def cover(rig: Rig, sequence: RigSequence) -> None:
    """Grows a table until all its tokens have a block."""
    appended: list[int] = []
    for block in await rig.grow(rig.gateway, -(-len(sequence.tokens) // 16) - len(sequence.blocks)):
        appended += [sequence.table, len(sequence.blocks), block]
        sequence.blocks.append(block)
    await rig.journal(appended=appended)


async def run_through(rig: Rig, tokens: list[int], **fields: Any) -> RigSequence:
    """Runs a prompt that is longer than the window, a block at a time, and closes it."""
    sequence = await rig.admit(tokens, **fields)
    for end in range(16, len(tokens) + 16, 16):
        while len(sequence.blocks) * 16 < min(end, len(tokens)):
            (block,) = await rig.grow(rig.gateway, 1)
            await rig.journal(appended=[sequence.table, len(sequence.blocks), block])
            sequence.blocks.append(block)
        await sequence.write(min(end, len(tokens)))
    await sequence.close()
    return sequence


@pytest.mark.parametrize(("written", "released"), [(39, 0), (54, 0), (55, 1), (70, 1), (71, 2), (80, 2)])
async def test_row_54_blocks_outside_the_window_become_null_and_return(
    open_rig: OpenRig, written: int, released: int
) -> None:
    """Otherwise a long sequence holds memory that nothing reads, or loses a position that its next query reads."""
    async with open_rig(window_spec()) as opened:
        sequence = await opened.admit(prompt(80))
        await cover(opened, sequence)
        await sequence.write(written)
        # The next query is at `written` and reads from written - 39 on.
        assert released * 16 <= max(0, written - (WINDOW - 1)) < (released + 1) * 16
        assert await entries(opened, sequence) == [0] * released + sequence.blocks[released:]
        for block in sequence.blocks[:released]:
            assert (await opened.block(block)).state == admin_pb2.BLOCK_STATE_CACHED
        assert (await opened.block(0)).sequence_ids == []


async def test_row_54_a_block_that_a_step_in_flight_still_reads_is_kept(window_rig: Rig) -> None:
    """Otherwise the block is written by another sequence while it is read."""
    sequence = await window_rig.admit(prompt(60))
    await cover(window_rig, sequence)
    await sequence.write(48)
    # Tokens 54 and on are in flight: the first of them reads from 15 on, the last position of the first block.
    await sequence.extend(range(900, 906), written=54)
    assert (await entries(window_rig, sequence))[0] == sequence.blocks[0]
    await sequence.write(55)
    assert (await entries(window_rig, sequence))[:2] == [0, sequence.blocks[1]]


async def test_row_54_what_was_released_is_still_found(window_rig: Rig) -> None:
    """Otherwise the head of a conversation is computed again although it is in memory."""
    sequence = await window_rig.admit(prompt(96))
    await cover(window_rig, sequence)
    await sequence.write()
    assert await entries(window_rig, sequence) == [0, 0, 0, *sequence.blocks[3:]]
    other = await window_rig.admit(prompt(33))
    assert other.blocks[:2] == sequence.blocks[:2]
    assert other.admission.cached_token_count == 32
    await sequence.close()
    again = await window_rig.admit([*prompt(96), 1])
    assert again.admission.cached_token_count == 96
    assert again.blocks[:3] == [0, 0, 0]
    assert again.blocks[3:6] == sequence.blocks[3:6]


async def test_row_54_a_shared_block_outside_one_window_stays_with_the_others(window_rig: Rig) -> None:
    """Otherwise a sequence that is ahead takes a block from one that still reads it."""
    first = await window_rig.admit(prompt(40))
    await first.write()
    second = await window_rig.admit([*prompt(32), 1])
    assert second.blocks[:2] == first.blocks[:2]
    await first.extend(range(900, 940))
    assert await entries(window_rig, first) == [0, 0, *first.blocks[2:]]
    assert (await window_rig.block(first.blocks[0])).ref_count == 1
    assert (await window_rig.block(first.blocks[0])).state == admin_pb2.BLOCK_STATE_USED
    assert await entries(window_rig, second) == second.blocks


async def test_row_54_a_sequence_of_any_length_holds_no_more_than_its_window(window_rig: Rig) -> None:
    """Otherwise long answers fill the pool although the model forgets them."""
    sequence = await window_rig.admit(prompt(10), skip_cache_write=True)
    for start in range(0, 1000, 5):
        await sequence.extend(range(start, start + 5))
        pool = await window_rig.pool()
        assert pool.used_block_count <= HIT + 1
        assert pool.cached_block_count == 0
    await sequence.close()
    assert (await window_rig.pool()).free_block_count == 32


async def test_row_54_what_was_told_before_may_be_told_again_after_its_blocks_were_released(window_rig: Rig) -> None:
    """Otherwise a gateway that repeats itself loses its connection."""
    sequence = await window_rig.admit(prompt(16))
    await sequence.extend(range(900, 964))
    before = window_rig.state()
    appended = [value for index, block in enumerate(sequence.blocks) for value in (sequence.table, index, block)]
    await window_rig.journal(
        tables=[sequence.table], token_starts=[0], token_counts=[80], token_ids=sequence.tokens, written_counts=[80],
        appended=appended,
    )  # fmt: skip
    assert window_rig.state() == before
    wrong = [*sequence.tokens[:-1], 5]
    with pytest.raises(StaleEpochError):
        await window_rig.journal(
            tables=[sequence.table], token_starts=[0], token_counts=[80], token_ids=wrong, written_counts=[80]
        )
    assert window_rig.state() == before


async def test_row_55_a_hit_needs_only_the_blocks_of_the_window(window_rig: Rig) -> None:
    """Otherwise evicting the head of a conversation, which nobody reads, costs all of it."""
    first = await run_through(window_rig, prompt(160), skip_cache_read=True)
    head = await window_rig.lease(28)
    evicted = [block for block in first.blocks if block in head]
    assert evicted == first.blocks[:6]
    await window_rig.journal(returned=head)
    again = await window_rig.admit([*prompt(160), 1])
    assert again.admission.cached_token_count == 160
    assert again.blocks == [*[0] * 7, *first.blocks[7:], again.blocks[-1]]


async def test_row_55_a_gap_inside_the_window_is_no_hit(window_rig: Rig) -> None:
    """Otherwise a query reads a block that was never filled for it."""
    first = await run_through(window_rig, prompt(160))
    evicted = await window_rig.lease(22 + 8)
    assert [block for block in first.blocks if block not in evicted] == first.blocks[7:9]
    await window_rig.journal(returned=evicted)
    again = await window_rig.admit([*prompt(160), 1])
    assert again.admission.cached_token_count == 0
    # The same tail after another head is other content.
    other = await window_rig.admit([*prompt(48, 3), *prompt(160)[48:], 1])
    assert other.admission.cached_token_count == 0


async def test_row_55_a_prompt_that_is_cached_as_a_whole_computes_one_token(window_rig: Rig) -> None:
    """Otherwise a repeated prompt computes up to a block again, only because the model slides."""
    first = await run_through(window_rig, prompt(90))
    again = await window_rig.admit(prompt(90))
    assert again.admission.cached_token_count == 89
    assert again.admission.copies == [(first.blocks[5], again.blocks[5])]
    await again.write()
    await again.close()


async def test_row_43_a_prompt_counts_at_most_its_window(open_rig: OpenRig) -> None:
    """Otherwise a long prompt waits for memory that it does not need, or is refused for ever."""
    async with open_rig(window_spec(usable=HIT + 2)) as rig:
        sequence = await rig.admit(prompt(1000))
        assert len(sequence.blocks) == HIT + 1
        assert (await rig.pool()).used_block_count == HIT + 1
        with pytest.raises(BlockPoolExhaustedError) as refused:
            await rig.admit(prompt(1000, 1))
        assert refused.value.metadata["needed_block_count"] == str(HIT + 1)
        assert refused.value.metadata["available_block_count"] == "1"
        # The rest of the prompt grows from the lease, as what is outside returns.
        for end in range(16, 1016, 16):
            await sequence.write(min(end, 1000))
            if len(sequence.blocks) * 16 < 1000 and end >= 48:
                (block,) = await rig.grow(rig.gateway, 1)
                await rig.journal(appended=[sequence.table, len(sequence.blocks), block])
                sequence.blocks.append(block)
        assert (await entries(rig, sequence))[:60] == [0] * 60
        await sequence.close()
        assert (await rig.admit([*prompt(1000), 1])).admission.cached_token_count >= 992


async def test_row_43_a_window_that_does_not_fit_the_pool_is_refused_with_both_numbers(open_rig: OpenRig) -> None:
    """Otherwise the request waits for ever."""
    async with open_rig(window_spec(usable=HIT)) as rig:
        await rig.admit(prompt(48))
        with pytest.raises(PromptTooLongError) as refused:
            await rig.admit(prompt(49))
        assert refused.value.metadata["needed_block_count"] == str(HIT + 1)
        assert refused.value.metadata["usable_block_count"] == str(HIT)


async def test_a_window_as_long_as_the_longest_sequence_is_none(open_rig: OpenRig) -> None:
    """Otherwise models served below their window pay for it."""
    async with open_rig(window_spec(max_model_len=96, window=96)) as rig:
        sequence = await rig.admit(prompt(90))
        assert len(sequence.blocks) == 6
        await sequence.write()
        assert await entries(rig, sequence) == sequence.blocks


async def test_a_dead_gateway_leaves_nothing_of_a_table_with_null_entries(window_rig: Rig) -> None:
    """Otherwise a fence frees the null block, or forgets one that was held."""
    sequence = await window_rig.admit(prompt(16))
    await sequence.extend(range(900, 990))
    await sequence.close(CloseReason.CANCELLED)
    core = window_rig.core
    number = core.connect_gateway("dying", 99, 1.0)
    request = AdmitRequest(POOL_ID, window_rig.epoch, "dying", 0, pack([*sequence.tokens, 1]))
    assert core.admit(number, request, 1.0).block_ids.count(0) > 0
    core.disconnect_gateway(number, 1.0)
    window_rig.check()
    # The window, the block that is written, and the source of its copy.
    assert core.pool(POOL_ID).memory.pool.count(BlockState.PENDING) == HIT + 2
    core.fenced(POOL_ID, window_rig.epoch, number, 1.0)
    window_rig.check()
    assert (await window_rig.pool()).used_block_count == 0


async def test_a_window_that_cannot_be_is_refused() -> None:
    """Otherwise a wrong setting is found by wrong answers."""
    async with grpc_rig(spec()) as rig, open_channel(rig.address) as channel:
        stub = memsvc_pb2_grpc.MemoryServiceStub(channel)
        request = memsvc_pb2.RegisterPoolRequest(
            executor_id="other", executor_incarnation=1, address="h:1",
            spec=memsvc_pb2.PoolSpec(
                block_count=8, block_size=16, model_id="m", kv_dtype="float32", max_model_len=64,
                sliding_window=2**31,
            ),
        )  # fmt: skip
        with pytest.raises(grpc.aio.AioRpcError, match="sliding_window") as refused:
            await stub.RegisterPool(request)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
