"""What memory must do where models attend over a sliding window. A scenario raises when it does not."""

from __future__ import annotations

from array import array

from gateway.core.request import Request, RequestSettings, SamplingSettings
from gateway.core.scheduler import Scheduler
from gateway.core.sequence import Sequence
from memsvc.core.pool import BlockState
from quire import window as rule
from quire.errors import InvalidRequestError
from quire.memory import Admission, PoolInfo, PoolSpec
from tests.mutants.gateway_scenarios import Machine
from tests.mutants.world import SIZE, Held, World, prompt, refused

WINDOW = 40


def what_is_outside_is_what_nobody_reads() -> None:
    """The rule in one line equals the rule position by position."""
    for window in (2, 15, 16, 17, 40):
        for written in range(100):
            positions = [range(index * SIZE, (index + 1) * SIZE) for index in range(8)]
            # The next query is at `written`; those after it read less of the past.
            unread = [all(written - position >= window for position in block) for block in positions]
            assert rule.outside_block_count(written, window, SIZE) == unread.count(True) == unread.index(False)
        boundary = 64 * SIZE
        read = range(max(0, boundary - window + 1), boundary)
        assert rule.hit_block_count(window, SIZE) == len({position // SIZE for position in read})
    assert rule.outside_block_count(1000, 0, SIZE) == 0


def filled(world: World, tokens: list[int]) -> Held:
    """Opens a sequence and has all of it written, a block at a time, with blocks from the lease."""
    held = world.admit(tokens)
    while held.written < len(tokens):
        index = held.written // SIZE
        if index == len(held.blocks):
            (block,) = world.lease(1)
            world.tell(appended=[held.table, index, block])
            held.blocks.append(block)
        world.write(held, min(len(tokens), (index + 1) * SIZE))
    return held


def a_window_that_moves_lets_go_of_what_is_behind() -> None:
    """Blocks outside return, are null in the table and stay matchable; those inside are kept."""
    world = World(window=WINDOW)
    held = filled(world, prompt(5 * SIZE))
    assert world.count(BlockState.USED) == 3
    assert world.count(BlockState.CACHED) == 2
    assert world.entries(held) == [0, 0, *held.blocks[2:]]
    assert world.references(held.blocks) == [0, 0, 1, 1, 1]
    early = world.admit([*prompt(2 * SIZE), 5])
    assert early.blocks[:2] == held.blocks[:2]
    world.close(early)
    world.close(held)
    assert world.count(BlockState.USED) == 0
    again = world.admit([*prompt(5 * SIZE), 5])
    assert again.blocks[:5] == [0, 0, *held.blocks[2:]]
    world.close(again)


def a_step_in_flight_keeps_what_it_reads() -> None:
    """A block stays until its last position is out of sight of the first token that is not confirmed."""
    world = World(window=WINDOW)
    held = filled(world, prompt(54))
    assert world.entries(held)[0] == held.blocks[0]
    world.extend(held, [1])
    assert world.entries(held)[0] == 0
    world.close(held)
    other = world.admit(prompt(6 * SIZE, 3))
    world.write(other, 55)
    assert world.entries(other) == [0, *other.blocks[1:]]


def a_hit_needs_the_window_alone() -> None:
    """The head may be gone; a gap inside the window is a miss."""
    world = World(window=WINDOW)
    held = filled(world, prompt(10 * SIZE))
    world.close(held)
    # The first six blocks are outside the last window, and are taken first.
    world.tell(returned=world.lease(6 + 6))
    again = world.admit([*prompt(10 * SIZE), 5])
    assert again.cached == 10 * SIZE
    assert again.blocks[:10] == [0] * 7 + held.blocks[7:]
    world.close(again)
    world.tell(returned=world.lease(6 + 8))
    assert world.admit([*prompt(10 * SIZE), 5]).cached == 0


def a_fork_begins_where_its_window_is_whole() -> None:
    """A fork needs what its first token reads; what is outside of that is null in the child and not held."""
    world = World(window=WINDOW)
    source = filled(world, prompt(6 * SIZE))
    # Three blocks are released: a token at 3 * 16 + 39 or later does not read them.
    refused(InvalidRequestError, world.fork, source, 1, 3 * SIZE + WINDOW - 2)
    (child,) = world.fork(source, 1, 3 * SIZE + WINDOW - 1)
    assert child.blocks == [0, 0, 0, *source.blocks[3:6]]
    assert world.entries(child) == child.blocks
    world.close(child)
    second = world.admit(prompt(4 * SIZE, 2))
    world.write(second, 2 * SIZE)
    (third,) = world.fork(second)
    world.write(second, 4 * SIZE)
    assert world.entries(second)[:2] == [0, second.blocks[1]]
    assert world.references(second.blocks[:2]) == [1, 2]
    assert world.entries(third) == second.blocks[:2]


def an_offer_for_a_released_block_is_over() -> None:
    """What was offered in place of a block goes with it; a gateway that takes the offer up late is not to blame."""
    world = World(window=WINDOW)
    first, second = world.admit(prompt(2 * SIZE)), world.admit(prompt(2 * SIZE))
    world.write(first)
    world.write(second)
    offered = world.offered()
    assert [(table, index) for table, index, _ in offered] == [(second.table, 0), (second.table, 1)]
    assert world.references(first.blocks) == [2, 2]
    world.extend(second, range(900, 900 + 24))
    assert world.references(first.blocks) == [1, 2]
    before = world.state()
    world.tell(replaced=list(offered[0]))
    assert world.state() == before
    world.tell(replaced=list(offered[1]))
    assert world.entries(second)[:2] == [0, first.blocks[1]]


def a_prompt_takes_no_more_than_its_window() -> None:
    """An admission takes what the first token needs; the rest of the prompt waits for its blocks."""
    world = World(4, window=WINDOW)
    held = world.admit(prompt(20 * SIZE))
    assert len(held.blocks) == 4
    world.close(held)
    for length in (SIZE, 4 * SIZE, 4 * SIZE + 1, 30 * SIZE):
        world.close(world.admit(prompt(length, 3)))


def what_is_told_again_of_released_blocks_is_nothing_new() -> None:
    """Growth and tokens whose blocks were released may be repeated, and change nothing."""
    world = World(window=WINDOW)
    held = filled(world, prompt(6 * SIZE))
    before = world.state()
    world.tell(appended=[value for index, block in enumerate(held.blocks) for value in (held.table, index, block)])
    world.tell(tables=[held.table], token_starts=[0], token_counts=[6 * SIZE], token_ids=held.tokens,
               written_counts=[6 * SIZE])  # fmt: skip
    assert world.state() == before


WINDOW_POOL = PoolInfo("pool", 1, True, PoolSpec(201, SIZE, 1024, "m", "float32", 1000, WINDOW), "host:1", 1)


def sliding(length: int, stock: int) -> tuple[Machine, Sequence]:
    """Returns a scheduler whose pool has a window, with `stock` blocks to grow with, and a sequence in it."""
    machine = Machine()
    machine.scheduler = Scheduler(WINDOW_POOL, 8, 64, max_preemptions=2)
    machine.scheduler.lease.refilled(list(range(100, 100 + stock)), stock)
    settings = RequestSettings("r", "m", array("I", range(1, length + 1)), 100, SamplingSettings())
    sequence = Request(settings, WINDOW_POOL.spec.max_model_len, 0.0).samples[0]
    machine.scheduler.start(sequence, Admission(1, 1, [1, 2, 3, 4][: -(-length // SIZE)], 0, []))
    return machine, sequence


def a_long_prompt_grows_as_its_window_moves() -> None:
    """A chunk is as long as its blocks; what the next one needs is asked for; a prompt without any waits."""
    machine, sequence = sliding(200, stock=1)
    machine.scheduler.update(machine.outcome(machine.plan()))
    assert machine.scheduler.blocks_wanted() == 3
    draft = machine.plan()
    assert draft.scheduled_counts == [SIZE]
    assert draft.appended == [1, 4, 100]
    machine.scheduler.update(machine.outcome(draft))
    assert not machine.plan().scheduled_counts
    assert not machine.scheduler.can_admit()
    assert sequence.blocks[:3] == [0, 0, 3]


def both_sides_release_at_the_same_token() -> None:
    """The gateway tells of the token at which a block falls out of the window, and takes it for gone then."""
    machine, sequence = sliding(50, stock=20)
    for _ in range(40):
        update = machine.scheduler.update(machine.outcome(machine.plan()))
        outside = max(0, (sequence.computed - WINDOW + 1) // SIZE)
        assert sequence.blocks.count(0) == sequence.released == outside
        if (sequence.computed - WINDOW + 1) % SIZE == 0:
            assert update.journal.written_counts == [sequence.computed]
    assert sequence.held_block_count <= 4


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        what_is_outside_is_what_nobody_reads,
        a_window_that_moves_lets_go_of_what_is_behind,
        a_step_in_flight_keeps_what_it_reads,
        a_hit_needs_the_window_alone,
        a_fork_begins_where_its_window_is_whole,
        an_offer_for_a_released_block_is_over,
        a_prompt_takes_no_more_than_its_window,
        what_is_told_again_of_released_blocks_is_nothing_new,
        a_long_prompt_grows_as_its_window_moves,
        both_sides_release_at_the_same_token,
    )
}
