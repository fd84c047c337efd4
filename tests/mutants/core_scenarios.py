"""What the memory core must do, each in a few commands. A scenario raises when it does not."""

from __future__ import annotations

from memsvc.core.lease import AnswerLog
from memsvc.core.pool import BlockState
from quire.columns import pack
from quire.errors import BlockPoolExhaustedError, InvalidRequestError, PromptTooLongError, StaleEpochError
from quire.media import MediaItem
from quire.memory import AdmitRequest, CloseReason
from tests.mutants.world import SIZE, USABLE, World, prompt, refused


def blocks_are_taken_in_order() -> None:
    """Ascending when fresh, blank before cached, least recently released first, the tail before the head."""
    world = World()
    first = world.run(prompt(3 * SIZE))
    second = world.run(prompt(2 * SIZE, 1))
    assert first.blocks + second.blocks == [1, 2, 3, 4, 5]
    cancelled = world.admit(prompt(2 * SIZE, 2))
    world.close(cancelled, CloseReason.CANCELLED)
    assert world.count(BlockState.CACHED) == 5
    taken = world.lease(USABLE)
    assert taken[:9] == list(range(8, USABLE + 1))
    assert sorted(taken[9:11]) == [6, 7]
    assert taken[11:] == [*first.blocks[::-1], *second.blocks[::-1]]
    assert world.lease(1) == []


def a_shortage_changes_nothing() -> None:
    """A request that does not fit is refused with both numbers, whatever it hits."""
    world = World()
    world.run(prompt(8 * SIZE))
    world.admit(prompt(6 * SIZE, 1))
    before = world.state()
    error = refused(BlockPoolExhaustedError, world.admit, prompt(8 * SIZE) + prompt(4 * SIZE, 2))
    assert (error.metadata["needed_block_count"], error.metadata["available_block_count"]) == ("4", "2")
    assert world.state() == before
    refused(PromptTooLongError, world.admit, prompt(USABLE * SIZE + 1, 3))
    assert world.state() == before


def hits_are_shared_and_never_evicted() -> None:
    """What was found is referenced at once, whether its first owner runs or has ended, and survives the request."""
    world = World()
    first = world.admit([*prompt(2 * SIZE), 7])
    world.write(first)
    second = world.admit([*prompt(2 * SIZE), 8])
    assert second.blocks[:2] == first.blocks[:2]
    assert world.references(second.blocks) == [2, 2, 1]
    world.close(first)
    assert world.references(second.blocks) == [1, 1, 1]
    world.write(second)
    world.close(second)
    hot = second.blocks[:2]
    full = world.admit(prompt(2 * SIZE) + prompt((USABLE - 2) * SIZE, 3))
    assert full.blocks[:2] == hot
    assert len(set(full.blocks)) == USABLE
    world.write(full)


def a_block_forgets_what_it_held() -> None:
    """A block that is given to other content matches nothing of the old, and counts no token of it."""
    world = World()
    world.run(prompt(4 * SIZE))
    world.lease(USABLE)
    world.tell(returned=list(range(1, USABLE + 1)))
    again = world.admit([*prompt(4 * SIZE), 1])
    assert again.cached == 0
    assert world.used_tokens() == 0
    assert world.pool.generation[again.blocks].min() > 0
    world.close(again, CloseReason.CANCELLED)
    world.run(prompt(4 * SIZE))
    other = world.admit(prompt(USABLE * SIZE, 5))
    world.close(other, CloseReason.CANCELLED)
    assert world.admit([*prompt(4 * SIZE), 2]).cached == 0


def nothing_matches_before_it_is_written() -> None:
    """Only what the executor has confirmed is published; what failed leaves nothing that was not."""
    world = World()
    first = world.admit(prompt(3 * SIZE))
    assert world.admit([*prompt(3 * SIZE), 1]).cached == 0
    world.write(first, SIZE + 4)
    assert world.admit([*prompt(3 * SIZE), 2]).cached == SIZE
    world.close(first, CloseReason.FAILED)
    assert world.admit([*prompt(3 * SIZE), 3]).cached == SIZE


def a_repeated_prompt_computes_one_token() -> None:
    """A prompt that is cached as a whole computes one token, through a copy whose source is held until it ran."""
    world = World()
    for length in (SIZE, 2 * SIZE, 2 * SIZE + 8):
        first = world.run(prompt(length, length))
        again = world.admit(prompt(length, length))
        assert again.cached == length - 1
        (source,) = [source for source, _ in again.copies]
        assert source in first.blocks
        world.tell(tables=[again.table], token_starts=[length], token_counts=[0], written_counts=[length - 1])
        assert world.references([source]) == [1], "the source is let go before it was copied"
        world.write(again)
        assert world.references([source]) == [0]
        world.close(again)


def equal_content_is_kept_once() -> None:
    """Of two sequences with equal content one is published, and the other falls back when it ends."""
    world = World()
    first, second = world.admit(prompt(2 * SIZE)), world.admit(prompt(2 * SIZE))
    world.write(first)
    world.write(second)
    world.close(second)
    assert world.count(BlockState.CACHED) == 0
    world.close(first)
    assert world.count(BlockState.CACHED) == 2
    third = world.admit([*prompt(2 * SIZE), 4])
    assert third.blocks[:2] == first.blocks
    # Where nobody uses the published one, the one in use takes its place.
    early, late = world.admit(prompt(SIZE, 1)), world.admit(prompt(SIZE, 1))
    world.write(early)
    world.close(early)
    world.write(late)
    assert world.count(BlockState.CACHED) == 0
    assert world.admit([*prompt(SIZE, 1), 4]).blocks[0] == late.blocks[0]


def tenants_share_nothing() -> None:
    """Another tenant, salt or adapter never finds a block."""
    world = World()
    world.run(prompt(2 * SIZE), tenant="a")
    assert world.admit([*prompt(2 * SIZE), 1], tenant="b").cached == 0
    assert world.admit([*prompt(2 * SIZE), 1], tenant="a", cache_salt="s").cached == 0
    assert world.admit([*prompt(2 * SIZE), 1], tenant="a", adapter="x").cached == 0
    assert world.admit([*prompt(2 * SIZE), 1], tenant="a").cached == 2 * SIZE


def media_are_part_of_what_is_shared() -> None:
    """Equal placeholders of another picture, or of the same one elsewhere, are other content from there on."""
    world = World(32)
    tokens = [*prompt(SIZE), *[7] * SIZE, *prompt(SIZE, 1)]
    cat, dog = (MediaItem(SIZE + 2, 8, digest * 16) for digest in (b"c", b"d"))
    shifted = MediaItem(SIZE + 3, 8, b"c" * 16)
    first = world.admit(tokens, media=(cat,))
    for count in (SIZE, 2 * SIZE, 3 * SIZE):
        world.write(first, count)
    world.close(first)
    for other in ((dog,), (shifted,), ()):
        assert world.admit([*tokens, 1], media=other).cached == SIZE
    assert world.admit([*tokens, 1], media=(cat,)).cached == 3 * SIZE
    world.run(tokens[: SIZE + 12], media=(dog,))
    assert world.admit(tokens[: SIZE + 12]).cached == SIZE
    assert world.admit(tokens[: 2 * SIZE], media=(cat,)).cached == SIZE
    bare = world.run(tokens[: 2 * SIZE])
    assert world.admit([*tokens[: 2 * SIZE], 1], media=(shifted,)).cached == SIZE
    assert world.admit([*tokens[: 2 * SIZE], 1]).blocks[:2] == bare.blocks
    assert world.core.locate(AdmitRequest("pool", world.epoch, "r", 0, pack(tokens), media=(dog,))) == SIZE
    refused(InvalidRequestError, world.admit, tokens, media=(cat, shifted))


def the_cache_can_be_left_out() -> None:
    """Who does not read it gets nothing from it; who does not write it leaves nothing."""
    world = World()
    world.run(prompt(2 * SIZE), skip_cache_write=True)
    assert world.count(BlockState.CACHED) == 0
    world.run(prompt(2 * SIZE))
    assert world.admit([*prompt(2 * SIZE), 1], skip_cache_read=True).cached == 0
    assert world.core.pool("pool").memory.statistics.query_token_count == 4 * SIZE


def a_collision_is_a_miss() -> None:
    """Equal digests of other tokens are told apart by the tokens."""

    def colliding(_parent: bytes, tokens: bytes | memoryview, block_size: int) -> list[bytes]:
        return [b"\1" * 16] * (len(tokens) // (4 * block_size))

    world = World(chain=colliding)
    first = world.admit(prompt(SIZE + 1))
    world.write(first)
    assert world.admit([*prompt(SIZE, 1), 1]).cached == 0


def a_dead_gateway_is_fenced_before_its_blocks_are_free() -> None:
    """Tables and leases of a gateway that is gone wait for the executor, then are free, their identities kept."""
    world = World()
    dying = world.connect("dying")
    shared = world.run(prompt(SIZE))
    held = world.admit([*prompt(SIZE), *prompt(SIZE + 4, 1)], dying)
    world.write(held)
    keeper = world.admit([*prompt(SIZE), 9])
    world.lease(2, dying)
    before = world.pool.available_block_count
    world.core.disconnect_gateway(dying, world.now)
    world.check()
    fence = world.fence()
    assert world.count(BlockState.PENDING) == 4
    assert world.pool.available_block_count == before
    assert not set(world.pool.free_order()) & {*held.blocks, *shared.blocks}
    refused(StaleEpochError, world.tell, dying, closed=[held.table], close_reasons=[1])
    world.core.fenced("pool", world.epoch - 1, fence.gateway_number, world.now)
    world.core.fenced("pool", world.epoch, world.gateway, world.now)
    assert world.count(BlockState.PENDING) == 4
    for _ in range(2):
        world.core.fenced("pool", world.epoch, fence.gateway_number, world.now)
        world.check()
        assert world.count(BlockState.PENDING) == 0
        assert world.count(BlockState.LEASED) == 0
        assert world.references(keeper.blocks) == [1, 1]
    assert world.admit(held.tokens).cached == len(held.tokens) - 1


def silence_ends_a_lease() -> None:
    """Who is not heard for the lease's time is gone; who is heard stays; a new incarnation voids the old."""
    world = World()
    silent = world.connect("silent")
    world.lease(2, silent)
    world.core.touch_gateway(world.gateway, 2.0)
    world.core.heartbeat("pool", 1, 2.0)
    world.core.expire(3.5)
    world.check()
    fence = world.fence()
    assert fence.gateway_number == silent
    world.admit(prompt(5))
    again = world.connect("one")
    fence = world.fence()
    assert (fence.gateway_number, again) != (again, world.gateway)
    world.core.expire(9.0)
    assert not world.core.pool("pool").ready


def an_executor_that_restarts_holds_nothing() -> None:
    """Its tables, leases and prefixes are void, its older life is refused, and late messages change nothing."""
    world = World()
    held = world.admit([*prompt(SIZE), 1])
    world.write(held)
    world.lease(2)
    old = world.epoch
    world.register(2)
    world.device.clear()
    assert world.epoch > old
    fresh = world.admit([*prompt(SIZE), 1])
    assert (fresh.cached, fresh.blocks) == (0, [1, 2])
    before = world.state()
    world.tell(epoch=old, closed=[fresh.table], close_reasons=[1])
    world.tell(epoch=old, tables=[fresh.table], token_starts=[17], token_counts=[0], written_counts=[17])
    assert world.state() == before
    refused(StaleEpochError, world.core.lease, world.gateway, "pool", old, 4, world.now)
    refused(StaleEpochError, world.admit, prompt(5), epoch=old)
    refused(StaleEpochError, world.tell, epoch=world.epoch + 1, closed=[fresh.table], close_reasons=[1])
    refused(StaleEpochError, world.register, 1)
    refused(StaleEpochError, world.core.heartbeat, "pool", 1, world.now)
    world.core.lose_pool("pool")
    refused(StaleEpochError, world.admit, prompt(5))
    assert world.core.pool("pool").epoch > world.epoch


def what_is_told_twice_counts_once() -> None:
    """Growth, tokens, closes, leases and numbered journals may all be repeated."""
    world = World()
    held = world.admit(prompt(SIZE))
    fields = world.extend(held, [1, 2, 3])
    before = world.state()
    world.tell(**fields)
    assert world.state() == before
    granted = world.core.granted_total(world.gateway, "pool")
    assert world.core.lease(world.gateway, "pool", world.epoch, granted, world.now) == []
    assert world.core.lease(world.gateway, "pool", world.epoch, granted - 1, world.now) == []
    assert world.tell(journal_no=1, closed=[held.table], close_reasons=[1])
    other = world.admit(prompt(SIZE, 2))
    before = world.state()
    assert not world.tell(journal_no=1, closed=[other.table], close_reasons=[1])
    assert world.state() == before
    refused(StaleEpochError, world.tell, journal_no=3, closed=[other.table], close_reasons=[1])
    assert world.state() == before


def the_preempted_find_their_blocks_last_of_all() -> None:
    """What a preempted sequence gave up goes after all that is cached, for as long as it may come back."""
    world = World()
    victim = world.admit(prompt(3 * SIZE))
    world.write(victim)
    world.close(victim, CloseReason.PREEMPTED)
    other = world.run(prompt(2 * SIZE, 1))
    blank = USABLE - 5
    assert world.lease(blank + 2)[blank:] == other.blocks[::-1]
    assert world.pool.free_order() == victim.blocks[::-1]
    back = world.admit([*prompt(2 * SIZE), 7], resumed=True)
    assert (back.blocks, back.cached) == (victim.blocks, 2 * SIZE)
    assert world.pool.free_order() == []
    stale = World()
    victim = stale.admit(prompt(3 * SIZE))
    stale.write(victim)
    stale.close(victim, CloseReason.PREEMPTED)
    stale.now += 1
    other = stale.run(prompt(2 * SIZE, 1))
    stale.core.extend_leases(1000)
    stale.now += 61
    assert stale.lease(blank + 1)[blank:] == other.blocks[1:]
    last = stale.admit([5])
    stale.write(last)
    stale.close(last)
    assert last.blocks == [other.blocks[0]]
    assert stale.lease(4) == [*victim.blocks[::-1], *last.blocks]


def answers_are_repeated() -> None:
    """A request with a number that was answered gets the same answer, not a second grant."""
    log: AnswerLog[str] = AnswerLog()
    assert log.get(3) is None
    log.put(3, "answer")
    assert log.get(3) == "answer"
    for number in range(4, 4 + 1024):
        log.put(number, "later")
    refused(StaleEpochError, log.get, 3)


def closed_tables_stay_closed() -> None:
    """What is said of a closed table is ignored, of one that never was refused; no number comes back."""
    world = World()
    closed = world.run(prompt(SIZE + 1))
    # The next table that has the same place in the columns.
    others = [world.admit([5], skip_cache_write=True) for _ in range(2)]
    for held in others:
        world.close(held)
    world.core.pool("pool").memory.tables._next = closed.table + 64
    heir = world.admit(prompt(SIZE + 1, 9))
    assert heir.table == closed.table + 64
    before = world.state()
    world.close(closed)
    world.tell(tables=[closed.table], token_starts=[17], token_counts=[1], token_ids=[4], written_counts=[17])
    world.tell(tables=[closed.table], token_starts=[17], token_counts=[0], written_counts=[17])
    assert world.state() == before
    refused(StaleEpochError, world.tell, closed=[heir.table + 1], close_reasons=[1])
    refused(StaleEpochError, world.tell, tables=[0], token_starts=[0], token_counts=[0], written_counts=[0])
    assert world.admit(prompt(4, 7)).table > heir.table


def a_gateway_touches_only_what_is_its_own() -> None:
    """Tables and leases of another gateway, and blocks that nobody was granted, are refused."""
    world = World()
    held = world.admit(prompt(SIZE))
    mine = world.lease(2)
    other = world.connect("other")
    theirs = world.lease(1, other)
    before = world.state()
    row = {"tables": [held.table], "token_starts": [16], "token_counts": [0], "written_counts": [16]}
    refused(StaleEpochError, world.tell, other, **row)
    refused(StaleEpochError, world.tell, other, closed=[held.table], close_reasons=[1])
    refused(StaleEpochError, world.tell, other, returned=mine)
    refused(StaleEpochError, world.tell, appended=[held.table, 1, theirs[0]])
    refused(StaleEpochError, world.tell, appended=[held.table, 1, USABLE])
    refused(StaleEpochError, world.tell, appended=[held.table, 2, mine[0]])
    refused(StaleEpochError, world.tell, appended=[held.table, 1, mine[0], held.table, 2, mine[0]])
    refused(StaleEpochError, world.tell, returned=[mine[0], mine[0]])
    refused(StaleEpochError, world.tell, appended=[held.table, 1, mine[0]], returned=[mine[0]])
    assert world.state() == before


def rows_must_fit_what_is_known() -> None:
    """Other tokens than known, a gap, or a written count that falls or runs ahead are refused as a whole."""
    world = World()
    held = world.admit(prompt(SIZE + 4))
    world.write(held, SIZE + 2)
    before = world.state()
    for start, tokens, written in ((19, [77], 18), (21, [1], 18), (20, [], 17), (20, [], 21), (20, [1] * 40, 18)):
        row = {"tables": [held.table], "token_starts": [start], "token_counts": [len(tokens)], "token_ids": tokens}
        refused(StaleEpochError, world.tell, written_counts=[written], **row)
        assert world.state() == before


def a_shortage_recalls_unused_blocks_once() -> None:
    """Gateways are asked for what is missing, not for all, and not again until they have answered."""
    world = World()
    blocks = world.lease(USABLE - 1)
    refused(BlockPoolExhaustedError, world.admit, prompt(4 * SIZE))
    assert world.recalled() == 3
    refused(BlockPoolExhaustedError, world.admit, prompt(4 * SIZE))
    assert world.recalled() == 0
    world.tell(returned=blocks[:3])
    world.admit(prompt(4 * SIZE))


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        blocks_are_taken_in_order,
        a_shortage_changes_nothing,
        hits_are_shared_and_never_evicted,
        a_block_forgets_what_it_held,
        nothing_matches_before_it_is_written,
        a_repeated_prompt_computes_one_token,
        equal_content_is_kept_once,
        tenants_share_nothing,
        media_are_part_of_what_is_shared,
        the_cache_can_be_left_out,
        a_collision_is_a_miss,
        a_dead_gateway_is_fenced_before_its_blocks_are_free,
        silence_ends_a_lease,
        an_executor_that_restarts_holds_nothing,
        what_is_told_twice_counts_once,
        answers_are_repeated,
        the_preempted_find_their_blocks_last_of_all,
        closed_tables_stay_closed,
        a_gateway_touches_only_what_is_its_own,
        rows_must_fit_what_is_known,
        a_shortage_recalls_unused_blocks_once,
    )
}
