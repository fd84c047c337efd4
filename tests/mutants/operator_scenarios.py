"""What an operator's hand on the cache must do, each in a few commands. A scenario raises when it does not."""

from __future__ import annotations

from memsvc.core.lease import PoolChanged
from memsvc.core.pool import BlockState
from quire.errors import CacheInUseError, StaleEpochError
from tests.mutants.world import POOL, SIZE, USABLE, World, prompt, refused


def a_reset_forgets_everything_and_harms_nobody() -> None:
    """Refused while a table is open; then nothing matches; forced, it voids the tables and tells the gateways."""
    world = World(cache_events=True)
    held = world.run(prompt(2 * SIZE + 4))
    running = world.admit([*prompt(SIZE, 1), 5])
    before = world.state()
    refused(CacheInUseError, world.core.reset_cache, POOL, world.now)
    assert world.state() == before
    world.close(running)
    assert world.core.reset_cache(POOL, world.now) == 3
    world.check()
    assert len(world.core.take_cache_events(POOL)) == 2
    assert world.admit(held.tokens).cached == 0
    world.core.take_events()
    refused(StaleEpochError, world.core.reset_cache, POOL, world.now, world.epoch)
    assert world.core.reset_cache(POOL, world.now, world.epoch + 3) == 3
    world.check()
    assert world.core.take_events() == [PoolChanged(POOL)]
    refused(StaleEpochError, world.admit, prompt(5))
    assert world.count(BlockState.FREE) == USABLE


SCENARIOS = {scenario.__name__: scenario for scenario in (a_reset_forgets_everything_and_harms_nobody,)}
