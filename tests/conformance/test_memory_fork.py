"""Rows 56, 67, 68 and 73 of the behaviour of memory, and invariant I3: tables that come to share blocks."""

from __future__ import annotations

import random

import numpy as np
import pytest

from protos.memsvc.v1 import admin_pb2
from quire.errors import InvalidRequestError, QuireError, SequenceNotFoundError, StaleEpochError
from quire.memory import CloseReason, ForkRequest
from tests.conformance.memory_connections import POOL_ID, StreamConnection, prompt, spec
from tests.conformance.memory_rig import Rig, RigSequence, grpc_rig, local_rig


async def written(rig: Rig, length: int, **fields: bool) -> RigSequence:
    """Returns an open sequence whose tokens are all written."""
    sequence = await rig.admit(prompt(length), **fields)
    await sequence.write()
    return sequence


async def references(rig: Rig, sequence: RigSequence) -> list[int]:
    """Returns how many tables name each block of a sequence."""
    return [(await rig.block(block)).ref_count for block in sequence.blocks]


async def test_row_67_a_fork_shares_every_block_and_takes_none(rig: Rig) -> None:
    """Otherwise n samples of a prompt hold it n times over."""
    source = await written(rig, 40)
    before = await rig.pool()
    children = await source.fork(3, first_sample_index=1)
    assert [child.blocks for child in children] == [source.blocks] * 3
    assert await references(rig, source) == [4, 4, 4]
    table = await rig.admin.GetBlockTable(admin_pb2.GetBlockTableRequest(sequence_id="request-0/2"))
    assert [entry.ref_count for entry in table.entries] == [4, 4, 4], "what `quire blocks` shows as x4"
    after = await rig.pool()
    assert after.used_block_count == before.used_block_count == 3
    assert (after.sequence_count, after.used_token_count) == (4, 40)
    listed = (await rig.admin.ListSequences(admin_pb2.ListSequencesRequest())).sequences
    assert [item.sequence_id.rpartition("/")[2] for item in listed] == ["0", "1", "2", "3"]
    assert len({item.sequence_id.rpartition("/")[0] for item in listed}) == 1
    assert [item.written_token_count for item in listed] == [40] * 4


async def test_rows_56_and_67_each_copy_is_made_at_the_first_write_and_the_last_holder_writes_in_place(
    rig: Rig,
) -> None:
    """Otherwise a sample overwrites another's keys and values, or the last one copies for nothing."""
    source = await written(rig, 40)
    first, second = await source.fork(2)
    shared = source.blocks[2]
    assert await first.replace() == shared
    assert (await rig.block(shared)).ref_count == 2
    await first.extend([900])
    assert await source.replace() == shared
    await source.extend([901])
    block = await rig.block(shared)
    assert (block.ref_count, block.state) == (1, admin_pb2.BLOCK_STATE_USED)
    await second.extend([902])
    assert second.blocks[2] == shared
    blocks = [sequence.blocks for sequence in (source, first, second)]
    assert [held[:2] for held in blocks] == [source.blocks[:2]] * 3
    assert len({held[2] for held in blocks}) == 3
    for sequence in (source, first, second):
        await sequence.extend(range(1000, 1000 + 7))
        await sequence.close()
    again = await rig.admit([*prompt(40), 902, *range(1000, 1007), 5])
    assert again.blocks[:3] == second.blocks[:3]
    assert again.admission.cached_token_count == 48


async def test_row_56_the_source_of_a_first_write_is_held_until_the_copy_ran(rig: Rig) -> None:
    """Otherwise the shared block is given to somebody else before it is copied."""
    source = await written(rig, 40)
    (child,) = await source.fork()
    shared = await child.replace()
    await source.close()
    assert shared not in rig.free_order()
    assert "source of 1 copies" in (await rig.block(shared)).explanation
    await child.write(40)
    assert shared not in rig.free_order(), "what the copy brings is no sign that it ran"
    await child.extend([900])
    assert shared in rig.free_order()


async def test_row_56_the_content_of_a_first_write_is_not_matchable_before_the_copy_ran(rig: Rig) -> None:
    """Otherwise a prompt reads a copy that was never made."""
    source = await written(rig, 40)
    (child,) = await source.fork()
    await child.replace()
    await child.close(CloseReason.CANCELLED)
    assert (await rig.block(child.blocks[2])).state == admin_pb2.BLOCK_STATE_FREE
    await source.extend([900])
    await source.close()
    assert (await rig.admit([*prompt(40), 900, 5])).admission.cached_token_count == 41


async def test_row_67_a_table_whose_copy_is_under_way_forks_at_its_full_blocks(rig: Rig) -> None:
    """Otherwise a child shares a block that nothing was written to yet."""
    source = await written(rig, 40)
    (child,) = await source.fork()
    await child.replace()
    with pytest.raises(InvalidRequestError, match=r"found 40, allowed are 1 .. 32"):
        await child.fork(1, 40)
    (grandchild,) = await child.fork()
    assert grandchild.blocks == child.blocks[:2]


@pytest.mark.invariant(3)
@pytest.mark.parametrize("writer", ["source", "child"])
async def test_a_write_into_a_block_that_another_table_names_is_refused(writer: str) -> None:
    """Otherwise a gateway that forgot to copy corrupts another sequence, and nobody notices."""
    async with grpc_rig(spec()) as rig:
        source = await written(rig, 40)
        (child,) = await source.fork()
        sequence = source if writer == "source" else child
        before = rig.state()
        with pytest.raises(StaleEpochError, match="which others hold") as caught:
            await sequence.extend([900])
        assert caught.value.reason == "SHARED_BLOCK"
        assert rig.state() == before


@pytest.mark.invariant(3)
async def test_tokens_may_be_told_before_the_block_is_copied_and_belong_to_their_table(rig: Rig) -> None:
    """Otherwise the tokens of one sample end up in another's identity, and its text is served to the wrong prompt."""
    source = await written(rig, 40)
    first, second = await source.fork(2)
    for number, sequence in enumerate((first, source, second)):
        await sequence.extend([700 + number], written=40)
    for number, sequence in enumerate((first, second, source)):
        if number < 2:
            await sequence.replace()
        await sequence.write()
        await sequence.extend(range(2000, 2007))
        await sequence.close()
    for number, sequence in enumerate((first, source, second)):
        again = await rig.admit([*prompt(40), 700 + number, *range(2000, 2007), 5])
        assert again.blocks[:3] == sequence.blocks[:3]


@pytest.mark.parametrize("at_token", [1, 15, 16, 17, 32, 39, 40])
async def test_row_68_a_fork_may_be_made_at_any_token_and_shares_nothing_behind_it(rig: Rig, at_token: int) -> None:
    """Otherwise an edit in the middle of a conversation computes all of it again, or reads what it left out."""
    source = await written(rig, 40)
    (child,) = await source.fork(1, at_token)
    assert child.blocks == source.blocks[: -(-at_token // 16)]
    assert child.tokens == source.tokens[:at_token]
    assert await references(rig, source) == [2] * len(child.blocks) + [1] * (3 - len(child.blocks))
    if at_token % 16:
        await child.replace()
    await child.extend([900] * 16)
    await child.close()
    await source.extend([901] * 16)
    await source.close()
    other = await rig.admit([*prompt(at_token), *[900] * 17])
    assert other.admission.cached_token_count >= at_token + 16 - (at_token + 16) % 16
    same = await rig.admit([*prompt(40), *[901] * 17])
    assert same.admission.cached_token_count == 56


async def test_row_68_a_child_from_the_middle_of_a_full_block_copies_it_although_it_is_alone(rig: Rig) -> None:
    """Otherwise it overwrites what prompts can match."""
    source = await written(rig, 40)
    (child,) = await source.fork(1, 20)
    request = ForkRequest(POOL_ID, rig.epoch, child.table, 1)
    assert (await rig.gateway.fork(request)).must_copy
    await source.close()
    with pytest.raises(StaleEpochError, match="which others hold"):
        await rig.journal(tables=[child.table], token_starts=[20], token_counts=[1], token_ids=[9], written_counts=[21])
    if rig.kind == "local":
        assert await child.replace() == source.blocks[1]
        await child.extend([900])
        assert (await rig.admit([*prompt(32), 5])).blocks[:2] == source.blocks[:2]


async def test_row_67_a_fork_of_a_fork_shares_what_its_source_shares(rig: Rig) -> None:
    """Otherwise a search that branches again and again copies at every branch."""
    source = await written(rig, 40)
    (child,) = await source.fork()
    (grandchild,) = await child.fork()
    assert grandchild.blocks == source.blocks
    assert await references(rig, source) == [3, 3, 3]
    await source.close()
    await child.close()
    await grandchild.extend([900])
    assert await references(rig, grandchild) == [1, 1, 1]
    assert grandchild.blocks == source.blocks


async def test_row_67_a_child_of_a_sequence_that_does_not_fill_the_cache_does_not_either(rig: Rig) -> None:
    """Otherwise what one sample was told to keep out of the cache is found there by way of another."""
    source = await written(rig, 40, skip_cache_write=True)
    (child,) = await source.fork()
    await source.close()
    await child.extend([900] * 8)
    await child.close()
    assert (await rig.admit([*prompt(40), 900])).admission.cached_token_count == 0
    assert (await rig.pool()).cached_block_count == 0


async def test_row_67_what_a_fork_fills_is_found_behind_the_prefix_that_it_shares(rig: Rig) -> None:
    """Otherwise a child continues the chain of identities at the wrong place, and serves other text than was asked."""
    source = await written(rig, 70)
    (child,) = await source.fork(1, 32)
    await child.extend(range(3000, 3017))
    again = await rig.admit([*prompt(32), *range(3000, 3017)])
    assert again.blocks[:3] == child.blocks[:3]
    assert (await rig.admit([*prompt(70), 5])).admission.cached_token_count == 64


async def test_a_fork_is_refused_with_what_is_allowed_and_changes_nothing(rig: Rig) -> None:
    """Otherwise a gateway's mistake opens half a fork."""
    source = await rig.admit(prompt(40))
    before = rig.state()
    with pytest.raises(InvalidRequestError, match=r"allowed are 1 .. 0: of table 1 0 tokens are written and 40 known"):
        await source.fork()
    await source.write(30)
    for count, at_token, expected in (
        (0, 0, r"count: found 0, allowed are 1 .. 1024"),
        (1025, 0, r"count: found 1025"),
        (1, 31, r"at_token: found 31, allowed are 1 .. 30"),
    ):
        with pytest.raises(InvalidRequestError, match=expected):
            await source.fork(count, at_token)
    other = rig.connect_raw("gateway-1")
    await other.start()  # type: ignore[attr-defined]
    for connection, table, epoch in ((other, source.table, 0), (rig.gateway, 99, 0), (rig.gateway, source.table, 1)):
        request = ForkRequest(POOL_ID, rig.epoch + epoch, table, 1)
        with pytest.raises((SequenceNotFoundError, StaleEpochError)):
            await connection.fork(request)
    assert len(rig.state()[6]) == len(before[6]) == 1
    await source.close()
    with pytest.raises(SequenceNotFoundError, match="not an open table"):
        await source.fork()


async def test_row_72_a_fork_asked_for_twice_is_made_once() -> None:
    """Otherwise a retry leaks tables."""
    async with grpc_rig(spec()) as rig:
        source = await written(rig, 40)
        assert isinstance(rig.gateway, StreamConnection)
        for _ in range(2):
            await rig.gateway.send(
                fork={"request_no": 77, "pool_id": POOL_ID, "epoch": rig.epoch, "table": source.table, "count": 2}
            )
            forked = await rig.gateway.receive("forked")
        assert len(rig.state()[6]) == 3
        assert len(forked.tables) == 8


async def test_a_replacement_must_be_of_a_shared_open_block_by_one_that_is_leased(rig: Rig) -> None:
    """Otherwise a table comes to name a block that was never granted, or loses one that it needs."""
    source = await written(rig, 40)
    (child,) = await source.fork()
    (block,) = await rig.lease(1)
    if rig.kind == "grpc":
        # The stream ends at the first journal that does not fit.
        with pytest.raises(StaleEpochError, match="is not leased to this gateway"):
            await rig.journal(replaced=[child.table, 2, block + 1])
        return
    before = rig.state()
    for table, index, new, expected in (
        (child.table, 2, block + 1, "is not leased"),
        (child.table, 2, 0, "is not leased"),
        (child.table, 2, 2**32 - 1, "is not leased"),
        (child.table, 1, block, "is not an open block"),
        (child.table, 3, block, "is not an open block"),
        (99, 2, block, "was never opened"),
    ):
        with pytest.raises(QuireError, match=expected):
            await rig.journal(replaced=[table, index, new])
    with pytest.raises(QuireError, match="is not an open block"):
        await rig.journal(replaced=[child.table, 2, block, source.table, 2, block])
    with pytest.raises(QuireError, match="also appended"):
        await rig.journal(replaced=[child.table, 2, block], returned=[block])
    assert rig.state() == before
    await child.replace(block=block)
    changed = rig.state()
    await rig.journal(replaced=[child.table, 2, block])
    assert rig.state() == changed


async def test_row_67_the_last_holder_writes_in_place_in_the_step_that_fenced_the_others(rig: Rig) -> None:
    """Otherwise the last sample stalls for a block that it does not need."""
    source = await written(rig, 40)
    first, second = await source.fork(2)
    await first.close()
    await rig.journal(
        tables=[second.table],
        token_starts=[40],
        token_counts=[1],
        token_ids=[900],
        written_counts=[41],
        closed=[source.table],
        close_reasons=[CloseReason.FINISHED],
    )
    assert (await rig.block(second.blocks[2])).ref_count == 1


async def test_rows_67_and_70_forks_of_a_gateway_that_is_gone_wait_for_its_fence_and_free_all(rig: Rig) -> None:
    """Otherwise shared blocks leak when a gateway dies."""
    other = rig.connect_raw("gateway-1")
    await other.start()  # type: ignore[attr-defined]
    source = await rig.admit(prompt(40), other)
    await source.write()
    first, _ = await source.fork(2)
    await first.replace()
    await other.close()
    for _ in range(100):
        if not (await rig.pool()).sequence_count:
            break
    pool = await rig.pool()
    assert (pool.used_block_count, pool.pending_free_block_count, pool.sequence_count) == (0, 0, 0)
    assert (await rig.admit(prompt(40))).admission.cached_token_count == 39


async def test_row_73_tables_follow_when_equal_blocks_become_one(rig: Rig) -> None:
    """Otherwise two users with one prompt hold it twice for as long as they talk."""
    first, second = await rig.admit(prompt(40)), await rig.admit(prompt(40))
    await first.write()
    assert await rig.merged() == []
    await second.write()
    offered = await rig.merged()
    assert offered == [(second.table, 0, first.blocks[0]), (second.table, 1, first.blocks[1])]
    assert [(await rig.block(block)).ref_count for block in first.blocks] == [1, 1, 1]
    own = second.blocks[:2]
    for _, index, block in offered:
        await second.replace(index, block)
    assert await references(rig, first) == [2, 2, 1]
    assert set(own) <= set(rig.free_order()[:28])
    assert (await rig.pool()).used_block_count == 4
    await first.close()
    await second.extend([900] * 8)
    assert (await rig.admit([*prompt(40), *[900] * 9])).blocks[:3] == second.blocks[:3]


async def test_row_73_of_equal_blocks_that_fill_at_once_one_takes_the_place_of_a_cached_one(rig: Rig) -> None:
    """Otherwise samples that say the same are offered a block that has just been given up, and free it twice."""
    tables = [await rig.admit(prompt(15)) for _ in range(3)]
    cached = await rig.run(prompt(16))
    for table in tables:
        table.tokens = prompt(16)
    await rig.journal(
        tables=[table.table for table in tables],
        token_starts=[15] * 3,
        token_counts=[1] * 3,
        token_ids=prompt(16)[15:] * 3,
        written_counts=[16] * 3,
    )
    first, second, third = tables
    offered = await rig.merged()
    assert offered == [(second.table, 0, first.blocks[0]), (third.table, 0, first.blocks[0])]
    assert cached.blocks[0] in rig.free_order()
    for table, (_, index, block) in zip((second, third), offered, strict=True):
        await table.replace(index, block)
    assert await references(rig, first) == [3]
    for table in tables:
        await table.close()
    assert (await rig.pool()).used_block_count == 0


async def test_row_73_an_offer_that_is_not_taken_up_ends_with_its_table(rig: Rig) -> None:
    """Otherwise a gateway that never follows leaks blocks."""
    first, second = await rig.admit(prompt(40)), await rig.admit(prompt(40))
    await first.write()
    await second.write()
    await first.close()
    assert first.blocks[0] not in rig.free_order()
    await second.close()
    pool = await rig.pool()
    assert (pool.used_block_count, pool.cached_block_count) == (0, 3)


async def test_row_73_only_what_was_offered_takes_the_place_of_a_full_block() -> None:
    """Otherwise a table comes to name somebody else's block."""
    async with grpc_rig(spec()) as rig:
        first, second = await rig.admit(prompt(40)), await rig.admit(prompt(40))
        await first.write()
        await second.write()
        before = rig.state()
        with pytest.raises(StaleEpochError, match="no block was offered"):
            await rig.journal(replaced=[second.table, 0, first.blocks[1]])
        assert rig.state() == before


async def test_row_73_a_fork_begins_with_what_was_offered_to_its_source(rig: Rig) -> None:
    """Otherwise the copies that are about to go live on in every child."""
    first, second = await rig.admit(prompt(40)), await rig.admit(prompt(40))
    await first.write()
    await second.write()
    (child,) = await second.fork()
    assert child.blocks == [*first.blocks[:2], second.blocks[2]]
    assert await references(rig, second) == [1, 1, 2]


@pytest.mark.parametrize("seed", range(2))
async def test_garbage_of_a_gateway_that_forks_is_refused_or_keeps_every_invariant(seed: int) -> None:
    """Otherwise a gateway with a defect breaks the pool for all, or ends the service."""
    source = random.Random(seed)
    accepted = refused = 0
    codes: set[str] = set()
    async with local_rig(spec(24)) as rig:
        stranger = await written(rig, 20)
        other = rig.connect_raw("gateway-1")
        await other.start()  # type: ignore[attr-defined]
        for _ in range(12):
            sequence = await rig.admit(prompt(source.choice([20, 40]), source.randrange(2)), other)
            await sequence.write(source.randint(sequence.admission.cached_token_count, len(sequence.tokens)))
            tables = [sequence.table, stranger.table, 0, 2**32 - 1]
            leased = await rig.lease(2, other)
            numbers = [0, 1, 2, 3, 15, 16, 17, 2**32 - 1]
            for _ in range(8):
                before = rig.state()
                try:
                    if source.random() < 0.4:
                        request = ForkRequest(
                            POOL_ID, rig.epoch, source.choice(tables), source.choice([*numbers[:4], 2000]),
                            source.choice(numbers), source.choice(numbers),
                        )  # fmt: skip
                        tables += (await other.fork(request)).tables
                    else:
                        blocks = [*leased, *sequence.blocks, *numbers]
                        replaced = [source.choice(tables), source.choice(numbers[:4]), source.choice(blocks)]
                        table, count = source.choice(tables), source.choice(numbers)
                        row = {"tables": [table], "token_starts": [source.choice(numbers)], "token_counts": [0]}
                        ended = [source.choice(tables)] if source.random() < 0.2 else []
                        await rig.journal(
                            other, replaced=replaced if source.random() < 0.7 else [], closed=ended,
                            close_reasons=[CloseReason.FINISHED] * len(ended),
                            **({**row, "written_counts": [count]} if source.random() < 0.5 else {}),
                        )  # fmt: skip
                    accepted += 1
                except QuireError as error:
                    codes.add(error.code.name)
                    assert rig.state() == before
                    refused += 1
                rig.check()
            open_tables = [table for table in tables if table in rig.core.pool(POOL_ID).memory.grants[2].tables]
            await rig.journal(other, closed=open_tables, close_reasons=[CloseReason.CANCELLED] * len(open_tables))
            await rig.journal(other, returned=np.flatnonzero(rig.core.pool(POOL_ID).memory.pool.lessee == 2).tolist())
    assert codes <= {"INVALID_ARGUMENT", "NOT_FOUND", "ABORTED"}
    assert min(accepted, refused) > 10
