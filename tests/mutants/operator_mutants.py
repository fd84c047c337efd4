"""The rules of what operators command, each taken out once, and the scenario that notices."""

from __future__ import annotations

from typing import Final

from tests.mutants.mutation import Mutant

_CORE: Final = "memsvc.core.operator:OperatorCommands"
_POOL: Final = "memsvc.core.pool:BlockPool"
_GATE: Final = "memsvc.core.ceilings:TenantGate"
_TENANCY: Final = "memsvc.core.tenancy:Tenancy"
_MEMORY: Final = "memsvc.core.pool_memory:PoolMemory"

RESET: Final = (
    Mutant(
        "a reset takes the blocks of running sequences",
        f"{_MEMORY}.reset",
        "if self.tables.open_count:",
        "if False:",
        "a_reset_forgets_everything_and_harms_nobody",
    ),
    Mutant(
        "what was cached before a reset still matches",
        f"{_MEMORY}.reset",
        "self.prefix.clear()",
        "pass",
        "a_reset_forgets_everything_and_harms_nobody",
    ),
    Mutant(
        "nobody is told that nothing matches any more",
        "memsvc.core.prefix:PrefixIndex.clear",
        "self.events.append(CacheCleared())",
        "pass",
        "a_reset_forgets_everything_and_harms_nobody",
    ),
    Mutant(
        "a forced reset does not raise the epoch",
        f"{_CORE}.reset_cache",
        "if not pool.epoch < epoch <= EPOCH_MAXIMUM:",
        "if epoch > EPOCH_MAXIMUM:",
        "a_reset_forgets_everything_and_harms_nobody",
    ),
    Mutant(
        "gateways are not told of a forced reset",
        f"{_CORE}.reset_cache",
        "self._events.append(PoolChanged(pool_id))",
        "pass",
        "a_reset_forgets_everything_and_harms_nobody",
    ),
    Mutant(
        "blocks that a reset cleared are lost",
        f"{_POOL}.discard_cached",
        "self._blank.put(blocks)",
        "pass",
        "a_reset_forgets_everything_and_harms_nobody",
    ),
)

QUOTAS: Final = (
    Mutant(
        "a tenant may hold more than its ceiling",
        f"{_GATE}._require",
        "if needed <= room:",
        "if True:",
        "a_ceiling_holds",
    ),
    Mutant(
        "growth is not set aside under a ceiling",
        f"{_GATE}.room",
        " - self._outstanding(tables, tag)",
        "",
        "a_ceiling_holds",
    ),
    Mutant(
        "a sequence's own growth is not set aside",
        f"{_GATE}.room",
        " - growth",
        "",
        "a_ceiling_holds",
    ),
    Mutant(
        "what never fits under a ceiling waits for ever",
        f"{_GATE}.require_possible",
        "ceiling is not None and final > ceiling",
        "False",
        "a_ceiling_holds",
    ),
    Mutant(
        "what never fits beside the floors waits for ever",
        f"{_GATE}.require_possible",
        "block_count > usable - others",
        "False",
        "a_floor_shelters",
    ),
    Mutant(
        "blocks that grew into a table are not counted",
        "memsvc.core.writer:JournalWriter._grow",
        "if pool.tenancy is not None:",
        "if False:",
        "a_ceiling_holds",
    ),
    Mutant(
        "blocks that became blank stay a tenant's",
        f"{_POOL}.drop",
        "if self.tenancy is not None:",
        "if False:",
        "a_ceiling_holds",
    ),
    Mutant(
        "the source of a copy breaks a ceiling",
        f"{_MEMORY}.admit",
        " or (room is not None and beside > room)",
        "",
        "a_ceiling_holds",
    ),
    Mutant(
        "what a floor shelters counts as room for others",
        f"{_MEMORY}.admit",
        "available -= gate.tenancy.sheltered(gate.number)",
        "pass",
        "a_floor_shelters",
    ),
    Mutant(
        "leases take what a floor shelters",
        "memsvc.core.ceilings:unsheltered",
        "return min(count, free), NOBODY",
        "return count, LAST_RESORT",
        "a_floor_shelters",
    ),
    Mutant(
        "a last sequence that cannot grow stands still for ever",
        "memsvc.core.ceilings:unsheltered",
        "free > 0 or len(grants.tables) != 1 or grants.leased",
        "True",
        "a_floor_shelters",
    ),
    Mutant(
        "eviction does not look at floors",
        f"{_TENANCY}._choose",
        "may[mine[self._excess(number, quota) :]] = False",
        "pass",
        "a_floor_shelters",
    ),
    Mutant(
        "a floor binds its own tenant",
        f"{_TENANCY}.sheltered",
        "quota.floor and number != taker",
        "quota.floor",
        "a_floor_does_not_bind_its_own_tenant",
    ),
)

COPIES: Final = (
    Mutant(
        "a tenant's copy at its first write is not counted",
        "memsvc.core.replacement:_copy",
        "memory.tenancy.entered(block, memory.tenancy.known(record.tenant_tag))",
        "pass",
        "what_forks_copy_is_counted_once",
    ),
)

RETENTION: Final = (
    Mutant(
        "a retained block is taken like any other",
        "memsvc.core.eviction:EvictionLanes.candidates",
        "rank = np.where(places < lane.expired, _UNRETAINED, _RETAINED)",
        "rank = np.full(len(places), _UNRETAINED)",
        "what_is_retained_outlives_strangers",
    ),
    Mutant(
        "a tenant retains beyond its quota",
        f"{_TENANCY}.retain",
        "new = new[:room]",
        "pass",
        "what_is_retained_outlives_strangers",
    ),
    Mutant(
        "the end of a prompt is retained before its beginning",
        f"{_MEMORY}.close",
        "blocks[reusable][::-1]",
        "blocks[reusable]",
        "what_is_retained_outlives_strangers",
    ),
    Mutant(
        "priorities do not matter",
        "memsvc.core.retention:head_start",
        "priority(retention)",
        "1",
        "what_is_retained_outlives_strangers",
    ),
    Mutant(
        "retention never expires",
        f"{_TENANCY}.expire",
        "if self._retained_total:",
        "if False:",
        "what_is_retained_outlives_strangers",
    ),
    Mutant(
        "nothing is retained when it is closed",
        f"{_MEMORY}.close",
        "if record.retention and",
        "if False and",
        "what_is_retained_outlives_strangers",
    ),
    Mutant(
        "retained blocks are never taken",
        f"{_TENANCY}.take",
        "blocks = self._choose(count, taker, retained=True)",
        "pass",
        "what_is_retained_outlives_strangers",
    ),
    Mutant(
        "a block that is evicted stays retained",
        f"{_TENANCY}._forget",
        "self._release(blocks[self.retention[blocks] != classes.NONE])",
        "pass",
        "what_is_retained_outlives_strangers",
    ),
)

_SAMPLER: Final = "memsvc.core.residency:ResidencySampler"

RESIDENCY: Final = tuple(
    Mutant(name, target, old, new, "lives_are_followed_to_their_end")
    for name, target, old, new in (
        ("a hit is not noted", f"{_POOL}.share", "self.residencies.accessed(blocks, now)", "pass"),
        ("a release is not noted", f"{_SAMPLER}.released", "self.lives[block].released = now", "pass"),
        ("the end of content is not noted", f"{_SAMPLER}.taken", "self.ended(blocks, now)", "pass"),
        (
            "unused blocks of a lease have lives",
            f"{_SAMPLER}.returned",
            "del self.lives[block]",
            "self.ended(blocks, 0)",
        ),
        ("all accesses of a life are kept", f"{_SAMPLER}.taken", "deque(maxlen=ACCESS_LIMIT)", "deque()"),
        ("blocks without content live on", f"{_SAMPLER}.released", "self.ended(blocks[~reusable], now)", "pass"),
        ("lives outlive a reset", f"{_MEMORY}.reset", "self.pool.residencies.clear()", "pass"),
    )
)

_VIEWS: Final = "memsvc.core.prefix_views"

PINS: Final = tuple(
    Mutant(name, target, old, new, "a_pin_holds")
    for name, target, old, new in (
        ("pins have no quota", f"{_CORE}.pin_prefix", "before + len(new) > limit", "False"),
        ("pins are of the tenant without a name", f"{_CORE}._matchable", "selector.tenant", '""'),
        (
            "an operator evicts what is pinned",
            "memsvc.core.prefix_views:evictable",
            "may &= memory.tenancy.retention != retention.PINNED",
            "pass",
        ),
        (
            "who computes a pinned text again ends the pin",
            f"{_MEMORY}.publish",
            "self.tenancy.succeed(other, block)",
            "pass",
        ),
        ("a pin is left without its beginning", f"{_CORE}.release_prefix", "(pinned & ~needed)", "pinned"),
        ("the beginning of a released prefix goes first", f"{_CORE}.release_prefix", "[::-1]", ""),
    )
)

FORGOTTEN: Final = tuple(
    Mutant(name, target, old, new, "what_must_go_goes_and_nothing_else")
    for name, target, old, new in (
        (
            "what others begin with goes too",
            f"{_VIEWS}:evictable",
            "may & ~with_beginnings(_matchable(memory) & ~may, parents)",
            "may",
        ),
        (
            "what is used is evicted",
            f"{_VIEWS}:evictable",
            "mask & (memory.pool.state == BlockState.CACHED)",
            "mask.copy()",
        ),
        (
            "what continues a prefix stays",
            f"{_VIEWS}:continuations",
            "with_continuations(first, parents)",
            "first",
        ),
        ("of a long prefix only some blocks are found", f"{_VIEWS}:_leaps", "parents = parents[parents]", "pass"),
        (
            "all that continues a prefix goes, whatever tokens it has",
            f"{_VIEWS}:continuations",
            "if len(path.rest):",
            "if False:",
        ),
        (
            "what must not be cached can be felt",
            f"{_VIEWS}:explain",
            " & (memory.prefix.published == Publication.FULL)",
            "",
        ),
        (
            "evictions are not remembered",
            f"{_MEMORY}.forget_evicted",
            "self.evictions.note(self.prefix.identities[:, 0][evicted], now)",
            "pass",
        ),
    )
)

_REUSE: Final = "memsvc.core.reuse:ReuseTrace"
_TRAFFIC: Final = "memsvc.core.traffic:_Reader"

SIZES: Final = tuple(
    Mutant(name, target, old, new, "other_sizes_find_what_they_would_have")
    for name, target, old, new in (
        ("a block counts twice on the way", f"{_REUSE}._needed", " - earlier_greater(before)", ""),
        ("what was cached before a reset is found", f"{_REUSE}.forget", "self._generation + 1", "self._generation"),
        ("completions are left out", f"{_TRAFFIC}.read", "self._closed(memory, one)", "pass"),
        ("the head is let go of before the tail", f"{_TRAFFIC}._closed", "[::-1]", ""),
    )
)

MUTANTS: Final = RESET + QUOTAS + RETENTION + RESIDENCY + COPIES + PINS + FORGOTTEN + SIZES
