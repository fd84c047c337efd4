"""What the command log must do, each in a few commands. A scenario raises when it does not."""

from __future__ import annotations

from memsvc.core.history import history
from memsvc.core.history_watches import watch_block, watch_sequence
from memsvc.core.log import CommandLog
from memsvc.core.replay import decode_entry, encode_entry, replay, replay_segments
from memsvc.core.snapshot import decode, digest, encode
from quire.errors import BlockPoolExhaustedError
from quire.memory import AdmitRequest
from tests.mutants.world import POOL, SIZE, World, prompt, refused


def _work(world: World, seed: int) -> None:
    """Has sequences share, copy, grow, run short, and lose their gateway."""
    first = world.run(prompt(3 * SIZE + 5, seed), tenant="a")
    second = world.admit([*first.tokens, 7, 8], tenant="a")
    world.write(second)
    world.extend(second, [9] * SIZE)
    world.run(prompt(2 * SIZE, seed + 1), tenant="b")
    world.core.locate(AdmitRequest(POOL, world.epoch, "look", 0, b"\1\0\0\0" * 40, tenant="a"))
    other = world.connect("other")
    world.core.touch_gateway(world.gateway, world.now + 0.5)
    world.admit(prompt(20, seed + 2), other)
    world.lease(2, other)
    # The same name again: its older life is over, and waits for its fence.
    world.connect("other")
    for fence in world.fences():
        world.core.fenced(fence.pool_id, fence.epoch, fence.gateway_number, world.now)
    world.close(second)
    world.lease(3)
    refused(BlockPoolExhaustedError, world.admit, prompt(SIZE * 15, seed + 3))


def the_log_gives_the_state_back() -> None:
    """From the start, from a snapshot and its tail, and elsewhere from bytes, bit for bit."""
    world = World()
    log = CommandLog(world.core, 1 << 22)
    _work(world, 3)
    assert log.rotate()
    held = digest(log.segments[-1].base)
    assert held == digest(world.core) == digest(replay_segments(log.segments[:1]))
    _work(world, 23)
    expected = digest(world.core)
    assert digest(log.segments[-1].base) == held, "the snapshot went on with the core"
    assert digest(replay_segments(log.segments)) == expected
    assert digest(replay_segments(log.segments[1:])) == expected
    lines = [encode_entry(entry) for entry in log.segments[1].entries()]
    elsewhere = decode(encode(log.segments[1].base))
    assert digest(replay(elsewhere, map(decode_entry, lines))) == expected


def a_full_log_still_covers_its_commands() -> None:
    """Whatever is dropped, what is kept begins with the state before it, and is within its bytes."""
    world = World()
    log = CommandLog(world.core, 1 << 17)
    for turn in range(120):
        world.run(prompt(30, turn % 7))
    assert 0 < log.first < log.end
    assert len(log.segments) == 2
    assert sum(len(segment.lines) for segment in log.segments) == log.end - log.first
    assert digest(replay_segments(log.segments)) == digest(world.core)


def who_reads_a_log_is_not_disturbed() -> None:
    """Segments that are dropped meanwhile stay as they were, until whoever reads them is done; then they are spare."""
    world = World()
    log = CommandLog(world.core, 1 << 22)
    assert log.rotate()
    reader, segments = log.read()
    before = digest(segments[1].base)
    _work(world, 3)
    for _ in range(3):
        assert log.rotate()
    assert digest(segments[1].base) == before
    log.done(reader, segments)
    _, kept = log.read()
    spare = kept[0].base.pool(POOL).memory
    log.done(_, kept)
    _work(world, 23)
    assert log.rotate()
    assert log.segments[1].base.pool(POOL).memory is spare, "memory is not used anew"
    assert digest(log.segments[1].base) == digest(world.core)


def history_tells_of_blocks_and_sequences() -> None:
    """Who had a block, in their order, and what became of a sequence."""
    world = World()
    log = CommandLog(world.core, 1 << 22)
    held = world.admit(prompt(SIZE + 4))
    world.write(held)
    world.extend(held, [5] * SIZE)
    world.close(held)
    block = watch_block(world.core, POOL, held.blocks[0])
    told = [record.change for record in history(log.segments, block) if record.change is not None]
    states = [(change.after.state.name, change.after.ref_count, change.after.publication.name) for change in told]
    assert states == [("USED", 1, "NONE"), ("USED", 1, "FULL"), ("CACHED", 0, "FULL")]
    (name,) = {change.sequence_id for change in told}
    records = list(history(log.segments, watch_sequence(log.segments, name.partition("/")[0])))
    assert [record.command for record in records] == ["admit", "journal", "journal", "journal"]
    changes = [record.change for record in records if record.change is not None]
    assert [change.after.block_count if change.after else 0 for change in changes] == [2, 2, 3, 0]
    assert [record.at for record in records] == sorted(record.at for record in records)


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        the_log_gives_the_state_back,
        a_full_log_still_covers_its_commands,
        who_reads_a_log_is_not_disturbed,
        history_tells_of_blocks_and_sequences,
    )
}
