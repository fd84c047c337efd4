"""What forks and merges must do, each in a few commands. A scenario raises when they do not."""

from __future__ import annotations

from array import array
from typing import Any

from gateway.core.merging import TableMerges
from gateway.core.sequence import Sequence, SequenceState
from gateway.core.sharing import SharedTails
from memsvc.core.pool import BlockState
from quire.errors import InvalidRequestError, PrefixPendingError, StaleEpochError
from quire.memory import CloseReason
from tests.mutants.world import SIZE, Held, World, prompt, refused


def written(world: World, length: int, **fields: bool) -> Held:
    """Returns an open sequence whose tokens are all written."""
    held = world.admit(prompt(length), **fields)
    world.write(held)
    return held


def a_fork_shares_its_beginning_and_nothing_else() -> None:
    """Every block of the beginning is named once more, at any token, and none of those behind it."""
    world = World()
    source = written(world, 3 * SIZE + 8)
    for at_token in (1, SIZE, SIZE + 1, 2 * SIZE + 5, 3 * SIZE + 8):
        (child,) = world.fork(source, 1, at_token)
        assert child.blocks == source.blocks[: -(-at_token // SIZE)]
        assert world.references(child.blocks) == [2] * len(child.blocks)
        assert world.read(child, at_token) == source.tokens[:at_token]
        world.close(child)
    assert world.references(source.blocks) == [1] * 4


def a_fork_ends_where_its_source_is_written() -> None:
    """What is only known, or in a copy that may not have run, is not there to be shared."""
    world = World()
    source = world.admit(prompt(2 * SIZE + 8))
    world.write(source, SIZE + 8)
    refused(InvalidRequestError, world.fork, source, 1, SIZE + 9)
    (child,) = world.fork(source)
    world.replace(child)
    refused(InvalidRequestError, world.fork, child, 1, SIZE + 1)
    assert world.fork(child)[0].blocks == source.blocks[:1]


def a_first_write_copies_and_the_last_holder_writes_in_place() -> None:
    """Nobody writes into what another names, and who is alone needs no block."""
    world = World()
    source = written(world, SIZE + 8)
    first, second = world.fork(source, 2)
    for held in (source, first, second):
        row = {"tables": [held.table], "token_starts": [SIZE + 8], "token_counts": [1], "token_ids": [9]}
        refused(StaleEpochError, world.tell, written_counts=[SIZE + 9], **row)
    shared = source.blocks[1]
    for number, held in enumerate((first, source)):
        world.replace(held)
        world.extend(held, [100 + number])
    world.extend(second, [102])
    assert second.blocks[1] == shared
    assert world.references([shared]) == [1]
    for number, held in enumerate((first, source, second)):
        assert world.read(held, SIZE + 9) == [*prompt(SIZE + 8), 100 + number]
        world.extend(held, [7] * 7)
    for number in range(3):
        assert world.admit([*prompt(SIZE + 8), 100 + number, *[7] * 7, 1]).cached == 2 * SIZE


def the_last_holder_writes_in_the_step_that_fenced_the_others() -> None:
    """One journal tells of the last end and of the first write in place, which fills the block."""
    world = World()
    source = written(world, 2 * SIZE - 1)
    (child,) = world.fork(source)
    child.tokens.append(5)
    world.compute(child)
    world.tell(
        tables=[child.table],
        token_starts=[2 * SIZE - 1],
        token_counts=[1],
        token_ids=[5],
        written_counts=[2 * SIZE],
        closed=[source.table],
        close_reasons=[CloseReason.FINISHED],
    )
    assert world.admit([*prompt(2 * SIZE - 1), 5, 1]).blocks[:2] == child.blocks


def what_a_first_write_copies_is_held_until_it_ran() -> None:
    """The source of the copy stays that long and no longer, and its target matches nothing before."""
    world = World()
    source = written(world, SIZE + 8)
    (child,) = world.fork(source)
    shared = world.replace(child)
    world.close(source)
    world.tell(tables=[child.table], token_starts=[SIZE + 8], token_counts=[0], written_counts=[SIZE + 8])
    assert world.references([shared]) == [1]
    world.extend(child, [9])
    assert world.references([shared]) == [0]
    again = world.fork(child)[0]
    world.replace(again)
    world.close(again)
    assert world.count(BlockState.CACHED) == 0


def tokens_told_early_belong_to_their_table() -> None:
    """Tokens that are known before the copy neither reach the shared block nor get lost."""
    world = World()
    source = written(world, SIZE + 8)
    children = world.fork(source, 2)
    for number, held in enumerate([source, *children]):
        held.tokens.append(200 + number)
        row = {"tables": [held.table], "token_starts": [SIZE + 8], "token_counts": [1], "token_ids": [200 + number]}
        world.tell(written_counts=[SIZE + 8], **row)
    for held in (source, children[0], children[1]):
        if held is not children[1]:
            world.replace(held)
        world.write(held)
        world.extend(held, [7] * 7)
    for number in range(3):
        assert world.admit([*prompt(SIZE + 8), 200 + number, *[7] * 7, 1]).cached == 2 * SIZE


def a_full_block_is_never_written_to() -> None:
    """A child from the middle of a full block copies it, alone or not, and prompts still find it."""
    world = World()
    source = written(world, 2 * SIZE)
    (child,) = world.fork(source, 1, SIZE + 4)
    (grandchild,) = world.fork(child)
    world.close(source)
    for held in (child, grandchild):
        row = {"tables": [held.table], "token_starts": [SIZE + 4], "token_counts": [1], "token_ids": [9]}
        refused(StaleEpochError, world.tell, written_counts=[SIZE + 5], **row)
        world.replace(held)
        world.extend(held, [9] * 12)
    assert world.admit([*prompt(2 * SIZE), 1]).cached == 2 * SIZE
    assert world.admit([*prompt(SIZE + 4), *[9] * 12, 1]).cached == 2 * SIZE


def a_child_goes_on_behind_its_own_prefix() -> None:
    """Its identities follow the last block that it shares; it fills the cache only if its source does."""
    world = World()
    source = written(world, 3 * SIZE)
    (child,) = world.fork(source, 1, SIZE)
    world.extend(child, prompt(SIZE, 4))
    assert world.admit([*prompt(SIZE), *prompt(SIZE, 4), 1]).cached == 2 * SIZE
    assert world.admit([*prompt(3 * SIZE), *prompt(SIZE, 4), 1]).cached == 3 * SIZE
    silent = world.admit(prompt(SIZE, 6), skip_cache_write=True)
    world.write(silent)
    (child,) = world.fork(silent)
    world.extend(child, prompt(SIZE, 7))
    world.close(child)
    world.close(silent)
    assert world.count(BlockState.CACHED) == 0


def only_what_was_granted_replaces_what_is_shared() -> None:
    """A block that is not leased, or the place of one that is not shared, is refused."""
    world = World()
    source = written(world, SIZE + 8)
    (child,) = world.fork(source)
    mine, theirs = world.lease(1)[0], world.lease(1, world.connect("other"))[0]
    before = world.state()
    for row in ([child.table, 1, theirs], [child.table, 1, 15], [child.table, 0, mine]):
        refused(StaleEpochError, world.tell, replaced=row)
    refused(StaleEpochError, world.tell, replaced=[child.table, 1, mine, source.table, 1, mine])
    refused(StaleEpochError, world.tell, replaced=[child.table, 1, mine], returned=[mine])
    assert world.state() == before
    world.replace(child, block=mine)
    other = world.admit(prompt(SIZE + 8, 3))
    world.write(other)
    refused(StaleEpochError, world.tell, replaced=[other.table, 1, world.lease(1)[0]])


def equal_blocks_become_one() -> None:
    """The table with the copy names the published block, which was held for it; the copy is free then."""
    world = World()
    first, second = world.admit(prompt(2 * SIZE + 4)), world.admit(prompt(2 * SIZE + 4))
    world.write(first)
    world.write(second)
    offered = world.offered()
    assert offered == [(second.table, 0, first.blocks[0]), (second.table, 1, first.blocks[1])]
    refused(StaleEpochError, world.tell, replaced=[second.table, 0, first.blocks[1]])
    world.close(first)
    assert not set(world.pool.free_order()) & set(first.blocks[:2])
    (child,) = world.fork(second)
    assert child.blocks[:2] == first.blocks[:2]
    world.close(child)
    old = second.blocks[0]
    world.replace(second, 0, first.blocks[0])
    assert world.references([old, first.blocks[0], first.blocks[1]]) == [0, 1, 1]
    world.close(second)
    assert world.count(BlockState.USED) == 0
    assert world.count(BlockState.CACHED) == 3
    assert world.admit([*prompt(2 * SIZE), 1]).blocks[:2] == first.blocks[:2]


def the_gateway_knows_who_shares() -> None:
    """Everybody copies but the last holder; a full block is copied by whoever was forked from its middle."""
    shared = SharedTails()
    shared.forked(1, [2, 3], 9, must_copy=False)
    assert all(shared.must_copy(table) for table in (1, 2, 3))
    shared.left(2)
    assert all(shared.must_copy(table) for table in (1, 3))
    shared.left(1)
    assert not shared.must_copy(3)
    shared.forked(4, [5], 8, must_copy=True)
    assert (shared.must_copy(4), shared.must_copy(5)) == (False, True)


def who_waits_for_a_prefix_is_charged_its_rest() -> None:
    """A prompt that another one computes is waited for as far as it is common, and not when it will never be there."""
    world = World()
    first = world.admit(prompt(3 * SIZE + 4))
    twin = [*prompt(2 * SIZE), *prompt(SIZE, 4), 1]
    assert refused(PrefixPendingError, world.admit, twin, wait_for_prefix=True).metadata["token_count"] == str(2 * SIZE)
    world.close(world.admit(twin), CloseReason.CANCELLED)
    world.write(first, SIZE)
    error = refused(PrefixPendingError, world.admit, twin, wait_for_prefix=True)
    assert (error.metadata["cached_token_count"], error.metadata["token_count"]) == (str(SIZE), str(2 * SIZE))
    world.write(first, 2 * SIZE)
    assert world.admit(twin, wait_for_prefix=True).cached == 2 * SIZE
    world.close(first, CloseReason.FAILED)
    world.close(world.admit(prompt(3 * SIZE + 5), wait_for_prefix=True), CloseReason.CANCELLED)
    dying = world.connect("dying")
    world.admit(prompt(SIZE + 4, 6), dying)
    world.core.disconnect_gateway(dying, world.now)
    world.close(world.admit(prompt(SIZE + 4, 6), wait_for_prefix=True), CloseReason.CANCELLED)
    world.admit(prompt(SIZE + 4, 7), skip_cache_write=True)
    world.admit(prompt(SIZE + 4, 7), wait_for_prefix=True)


def tables_follow_behind_the_steps_in_flight() -> None:
    """What is offered is told of when the step that took it up is done, and is not taken up by tables that end."""
    running, closing = (sequence(table, [4, 5], state) for table, state in ((1, "RUNNING"), (2, "CLOSING")))
    merges = TableMerges()
    merges.offer([(1, 1, 9), (2, 0, 8)])
    assert merges.plan(3, [running, closing]) == [1, 1, 9]
    assert (running.blocks, closing.blocks) == ([4, 9], [4, 5])
    assert merges.plan(4, [running, closing]) == []
    assert merges.done(2) == []
    assert merges.done(3) == [1, 1, 9]
    assert merges.done(3) == []
    running.blocks, running.released = [0, 9], 1
    merges.offer([(1, 0, 7)])
    assert merges.plan(5, [running]) == []
    assert running.blocks == [0, 9]


def sequence(table: int, blocks: list[int], state: str) -> Sequence:
    """Returns a sequence that has a table."""
    request: Any = None
    made = Sequence(request, 0, array("I", [1]), 100)
    made.table, made.blocks, made.state = table, blocks, SequenceState[state]
    return made


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        a_fork_shares_its_beginning_and_nothing_else,
        a_fork_ends_where_its_source_is_written,
        a_first_write_copies_and_the_last_holder_writes_in_place,
        the_last_holder_writes_in_the_step_that_fenced_the_others,
        what_a_first_write_copies_is_held_until_it_ran,
        tokens_told_early_belong_to_their_table,
        a_full_block_is_never_written_to,
        a_child_goes_on_behind_its_own_prefix,
        only_what_was_granted_replaces_what_is_shared,
        equal_blocks_become_one,
        the_gateway_knows_who_shares,
        who_waits_for_a_prefix_is_charged_its_rest,
        tables_follow_behind_the_steps_in_flight,
    )
}
