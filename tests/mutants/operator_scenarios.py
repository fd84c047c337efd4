"""What an operator's hand on the cache must do, each in a few commands. A scenario raises when it does not."""

from __future__ import annotations

from memsvc.core.lease import PoolChanged
from memsvc.core.log import CommandLog
from memsvc.core.pool import BlockState
from memsvc.core.prefix_views import MissReason, PrefixSelector
from memsvc.core.residency import ACCESS_LIMIT
from memsvc.core.tenancy import TenantQuota
from memsvc.core.traffic import read_traffic
from quire.columns import pack
from quire.errors import (
    BlockPoolExhaustedError,
    CacheInUseError,
    PinQuotaError,
    PromptTooLongError,
    StaleEpochError,
    TenantCeilingError,
)
from quire.memory import AdmitRequest, CloseReason
from tests.mutants.world import POOL, SIZE, USABLE, World, prompt, refused

LAST_RESORT_BLOCKS = 4


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


def a_ceiling_holds() -> None:
    """What runs and may still grow counts, a shared block once; what never fits is refused at once."""
    world = World()
    world.core.set_quota(POOL, "a", TenantQuota(ceiling=6))
    first = world.admit(prompt(2 * SIZE), tenant="a", max_new_tokens=SIZE)
    world.write(first)
    refused(TenantCeilingError, world.admit, prompt(4 * SIZE, 1), tenant="a")
    refused(TenantCeilingError, world.admit, prompt(SIZE, 1), tenant="a", max_new_tokens=3 * SIZE)
    second = world.admit([*prompt(2 * SIZE), 1], tenant="a", max_new_tokens=SIZE)
    refused(TenantCeilingError, world.admit, prompt(SIZE + 1, 3), tenant="a")
    world.admit(prompt(8 * SIZE), tenant="b")
    refused(PromptTooLongError, world.admit, prompt(2 * SIZE), tenant="a", max_new_tokens=5 * SIZE)
    world.extend(first, prompt(SIZE, 2))
    refused(TenantCeilingError, world.admit, prompt(SIZE + 1, 3), tenant="a")
    world.close(first)
    revived = world.admit([*first.tokens[: 3 * SIZE], 6], tenant="a")
    assert revived.cached == 3 * SIZE
    world.close(second)
    world.close(revived, CloseReason.CANCELLED)
    assert world.core.pool(POOL).memory.tenant_use(world.core.tenant_tag(POOL, "a")).held == 0
    world.core.set_quota(POOL, "a", TenantQuota(ceiling=3))
    # The source of a copy would be one block more than it may hold: what it saves is computed.
    assert world.admit(first.tokens[: 3 * SIZE], tenant="a").cached == 2 * SIZE


def a_floor_shelters() -> None:
    """Others' admissions and leases take nothing from below it, its own do; a last sequence gets what it needs."""
    world = World()
    world.run(prompt(6 * SIZE), tenant="quiet")
    newer = world.run(prompt(2 * SIZE, 7), tenant="busy")
    world.core.set_quota(POOL, "quiet", TenantQuota(floor=4))
    one = world.admit(prompt(5 * SIZE, 1), tenant="busy")
    two = world.admit(prompt(5 * SIZE, 2), tenant="busy")
    refused(BlockPoolExhaustedError, world.admit, prompt(3 * SIZE, 3), tenant="busy")
    refused(PromptTooLongError, world.admit, prompt(13 * SIZE, 3), tenant="busy")
    leased = world.lease(5)
    assert sorted(leased) == sorted(newer.blocks)
    assert world.lease(1) == []
    world.close(two, CloseReason.CANCELLED)
    world.tell(returned=leased)
    world.admit(prompt(7 * SIZE, 4), world.connect("other"), tenant="busy")
    assert len(world.lease(9)) == LAST_RESORT_BLOCKS
    assert world.lease(1) == []
    world.close(one)


def a_floor_does_not_bind_its_own_tenant() -> None:
    """What is kept for a tenant is kept from others."""
    world = World()
    world.core.set_quota(POOL, "a", TenantQuota(floor=12))
    world.run(prompt(12 * SIZE), tenant="a")
    world.admit(prompt(12 * SIZE, 1), tenant="a")


def what_is_retained_outlives_strangers() -> None:
    """Within its quota, the beginning first, least worth first, until it expires; it yields when nothing is left."""
    world = World()
    world.core.set_quota(POOL, "", TenantQuota(retained=6))
    strong = world.run(prompt(4 * SIZE), retention_priority=100, retention_ttl_seconds=64)
    weak = world.run(prompt(4 * SIZE, 1), retention_priority=10, retention_ttl_seconds=64)
    assert world.core.pool(POOL).memory.tenant_use(world.core.tenant_tag(POOL, "")).retained == 6
    world.run([*prompt(SIZE), 7])
    world.run(prompt(8 * SIZE, 2), tenant="stranger")
    held = world.admit(prompt(10 * SIZE, 3), tenant="stranger")
    world.close(held, CloseReason.CANCELLED)
    assert found(world, strong.tokens) == 4 * SIZE
    assert found(world, weak.tokens) == 2 * SIZE
    # A stronger wish stays, a failed sequence wishes nothing, and what is left is taken in the end.
    world.close(world.admit([*prompt(SIZE), 8], retention_priority=10), CloseReason.FAILED)
    world.close(world.admit(prompt(11 * SIZE, 4), tenant="stranger"), CloseReason.CANCELLED)
    assert found(world, strong.tokens) == 4 * SIZE
    assert found(world, weak.tokens) == SIZE
    world.now += 65
    fresh = world.run(prompt(4 * SIZE, 5), tenant="stranger")
    world.close(world.admit(prompt(12 * SIZE, 6), tenant="other"), CloseReason.CANCELLED)
    assert found(world, strong.tokens) == 0, "it has expired"
    assert found(world, fresh.tokens, tenant="stranger") == 4 * SIZE
    assert world.core.pool(POOL).memory.tenant_use(world.core.tenant_tag(POOL, "")).retained == 0
    world.run(prompt(USABLE * SIZE, 8), session_id="s")
    world.admit(prompt(USABLE * SIZE, 9), tenant="other")


def found(world: World, tokens: list[int], **fields: str) -> int:
    """Returns how many tokens of a prompt are cached; changes nothing."""
    return world.core.locate(AdmitRequest(POOL, world.epoch, "r", 0, pack([*tokens, 1]), **fields))  # type: ignore[arg-type]


def what_forks_copy_is_counted_once() -> None:
    """A tenant's count is what its tables name: a shared block once, and a copy from the first write on."""
    world = World()
    world.core.set_quota(POOL, "", TenantQuota(ceiling=6))
    source = world.admit(prompt(SIZE + 8))
    world.write(source)
    child, other = world.fork(source, 2)
    count = world.core.pool(POOL).memory.tenant_use
    tag = world.core.tenant_tag(POOL, "")
    assert count(tag).held == 2
    for number, held in enumerate((child, other)):
        world.replace(held)
        world.extend(held, [100 + number])
        assert count(tag).held == 3 + number
    for held in (source, child, other):
        world.close(held)
    assert count(tag).held == 0


def lives_are_followed_to_their_end() -> None:
    """A block's life runs from being taken to the loss of its content; leased blocks that come back had none."""
    world = World(residency_every=1)
    sampler = world.pool.residencies
    assert sampler is not None
    world.close(world.admit(prompt(5)))
    first = world.run(prompt(2 * SIZE))
    for number in range(6):
        world.close(world.admit([*first.tokens, number], skip_cache_write=True))
    unused = world.lease(3)
    world.tell(returned=unused)
    before = world.now
    assert not [life for life in sampler.records() if life.block_id in first.blocks]
    assert {life.lifetime > 0 for life in sampler.records()} == {True}
    evicted = world.lease(USABLE)
    ended = {life.block_id: life for life in sampler.records() if life.ended == world.now}
    assert set(ended) == set(first.blocks) <= set(evicted)
    for life in ended.values():
        assert len(life.accesses) == ACCESS_LIMIT
        assert 0 < life.idle < life.lifetime and max(life.accesses) <= life.released <= before
    world.tell(returned=evicted)
    assert world.core.reset_cache(POOL, world.now) == 0
    assert not sampler.records()


def a_pin_holds() -> None:
    """Within its quota, through whoever computes the text again, until it is released, the tail before the head."""
    world = World()
    text = prompt(4 * SIZE)
    world.run(text, tenant="a")
    world.run(text, tenant="b")
    world.core.set_quota(POOL, "a", TenantQuota(pinned=3))
    refused(PinQuotaError, world.core.pin_prefix, POOL, PrefixSelector(pack(text), "a"), world.now)
    refused(PinQuotaError, world.core.pin_prefix, POOL, PrefixSelector(pack(text), "b"), world.now)
    world.core.set_quota(POOL, "a", TenantQuota(pinned=5))
    whole, head = PrefixSelector(pack(text), "a"), PrefixSelector(pack(text[: 2 * SIZE]), "a")
    assert world.core.pin_prefix(POOL, whole, world.now) == 4
    assert world.core.evict_prefix(POOL, PrefixSelector(pack(text), "b"), world.now) == (4, 0)
    assert world.core.evict_prefix(POOL, whole, world.now) == (0, 4)
    world.run(text, tenant="a", skip_cache_read=True)
    assert world.core.release_prefix(POOL, head) == 0
    leased = world.lease(USABLE)
    assert len(leased) == USABLE - 4
    assert found(world, text, tenant="a") == 4 * SIZE
    assert world.core.release_prefix(POOL, whole) == 4
    world.check()
    world.lease(2)
    assert found(world, text, tenant="a") == 2 * SIZE


def what_must_go_goes_and_nothing_else() -> None:
    """A text is forgotten with all that begins with it; what others begin with stays, and nobody reads along."""
    world = World()
    system, mine, yours = prompt(2 * SIZE), prompt(SIZE + 8, 1), prompt(SIZE + 8, 2)
    for text in (mine, yours):
        world.run([*system, *text])
    hidden = world.admit(prompt(SIZE, 3), skip_cache_write=True)
    world.write(hidden)
    for tokens in (prompt(SIZE, 3), prompt(4, 3)):
        reason = world.core.explain_prefix(POOL, PrefixSelector(pack(tokens), "b")).reason
        assert reason in {MissReason.NEVER_SEEN, MissReason.TOO_SHORT}
    assert world.core.evict_prefix(POOL, PrefixSelector(pack([*system, *yours[:8]])), world.now) == (2, 2)
    assert found(world, [*system, *mine]) == 3 * SIZE + 8
    assert world.core.explain_prefix(POOL, PrefixSelector(pack([*system, *yours]))).reason is MissReason.EVICTED
    running = world.admit([*system, 5])
    assert world.core.evict_prefix(POOL, PrefixSelector(pack(system)), world.now) == (2, 2)
    world.check()
    assert found(world, [*system, *mine]) == 2 * SIZE
    world.close(running, CloseReason.CANCELLED)
    assert world.core.evict_prefix(POOL, PrefixSelector(pack(system[:5])), world.now) == (2, 0)
    world.run(prompt(12 * SIZE, 8))
    assert world.core.evict_prefix(POOL, PrefixSelector(pack(prompt(SIZE, 8))), world.now) == (12, 0)


def other_sizes_find_what_they_would_have() -> None:
    """Shared beginnings, what others left behind, a run of blocks up to the first that is gone, and nothing older."""
    world = World(usable=64)
    log = CommandLog(world.core, 1 << 27)
    system, mine, yours = prompt(2 * SIZE), prompt(2 * SIZE, 1), prompt(3 * SIZE, 2)
    world.run([*prompt(SIZE, 9), 1])
    world.core.reset_cache(POOL, world.now)
    world.run([*prompt(SIZE, 9), 1])
    for text in (mine, yours, mine):
        world.run([*system, *text, 1])
    turn = world.admit([*system, 3])
    world.extend(turn, prompt(SIZE, 4))
    world.close(turn)
    world.run([*turn.tokens, 1])
    failed = world.admit(prompt(SIZE, 5))
    world.write(failed)
    world.close(failed, CloseReason.FAILED)
    world.run([*prompt(SIZE, 5), 1])
    traffic = read_traffic(log.segments, POOL, SIZE)
    asked = traffic.trace.asked_block_count
    assert asked == 21, "blocks asked for"
    shares, endless = traffic.trace.found([2, 3, 6, 7])
    # The system prompt four times and what failed, the block that a completion filled, and the two of `mine`.
    assert [round(share * asked) for share in shares] == [9, 10, 11, 12]
    assert round(endless * asked) == 12
    assert (traffic.asked_token_count, traffic.found_token_count) == (361, 12 * SIZE + 1)


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        a_reset_forgets_everything_and_harms_nobody,
        a_ceiling_holds,
        a_floor_shelters,
        a_floor_does_not_bind_its_own_tenant,
        what_is_retained_outlives_strangers,
        what_forks_copy_is_counted_once,
        lives_are_followed_to_their_end,
        a_pin_holds,
        what_must_go_goes_and_nothing_else,
        other_sizes_find_what_they_would_have,
    )
}
