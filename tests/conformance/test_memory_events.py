"""Rows 59 and 60 of the behaviour of memory: what is told of contents that come and go.

The core alone builds events; whoever shares them over the network is tested where that is done.
"""

from __future__ import annotations

from memsvc.core.events import BlocksRemoved, BlocksStored
from quire import hashing
from quire.memory import CloseReason
from tests.conformance.memory_connections import POOL_ID, pack, prompt, spec
from tests.conformance.memory_rig import local_rig


async def test_row_59_blocks_that_one_command_publishes_are_one_event_with_all_that_others_need() -> None:
    """Otherwise another replica's index cannot be kept, or costs more than the blocks."""
    async with local_rig(spec(), cache_events=True) as rig:
        root = rig.core.prefix_root(POOL_ID, tenant="t")
        sequence = await rig.admit(prompt(40), tenant="t")
        assert rig.core.take_cache_events(POOL_ID) == []
        await sequence.write()
        (stored,) = rig.core.take_cache_events(POOL_ID)
        assert isinstance(stored, BlocksStored)
        identities = hashing.chain(root, pack(prompt(32)), 16)
        assert stored.blocks.tolist() == sequence.blocks[:2]
        assert stored.indexes.tolist() == [0, 1]
        assert stored.identities == b"".join(identities)
        assert stored.parents == root + identities[0]
        assert (stored.token_ids, stored.block_size) == (pack(prompt(32)), 16)
        assert len(set(stored.tenant_tags.tolist())) == 1
        assert rig.core.take_cache_events(POOL_ID) == []


async def test_row_59_every_identity_that_goes_is_told_of_once() -> None:
    """Otherwise a hint leads to a block that holds something else."""
    async with local_rig(spec(), cache_events=True) as rig:
        sequence = await rig.run(prompt(48))
        (stored,) = rig.core.take_cache_events(POOL_ID)
        assert isinstance(stored, BlocksStored)
        await rig.lease(29 + 2)
        removed = rig.core.take_cache_events(POOL_ID)
        assert all(isinstance(event, BlocksRemoved) for event in removed)
        gone = {
            (block, event.identities[16 * row : 16 * row + 16])
            for event in removed
            for row, block in enumerate(event.blocks.tolist())
        }
        assert gone == {(sequence.blocks[1], stored.identities[16:32]), (sequence.blocks[2], stored.identities[32:])}
        assert sum(len(event.blocks) for event in removed if isinstance(event, BlocksRemoved)) == 2


async def test_row_59_what_others_publish_already_is_told_of_once() -> None:
    """Otherwise the other replica counts a block twice and keeps it when one copy goes."""
    async with local_rig(spec(), cache_events=True) as rig:
        first, second = await rig.admit(prompt(16)), await rig.admit(prompt(16))
        await first.write()
        await second.write()
        assert len(rig.core.take_cache_events(POOL_ID)) == 1
        await second.close()
        assert rig.core.take_cache_events(POOL_ID) == []


async def test_row_60_nothing_is_built_while_nobody_wants_to_know() -> None:
    """Otherwise a feature that is off costs every step."""
    async with local_rig(spec()) as rig:
        await rig.run(prompt(48))
        blocks = await rig.lease(32)
        await rig.journal(returned=blocks)
        late = await rig.admit(prompt(48, 2))
        await late.close(CloseReason.CANCELLED)
        assert rig.core.take_cache_events(POOL_ID) == []
        assert rig.core.pool(POOL_ID).memory.prefix.events is None
