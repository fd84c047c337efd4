"""Hints: which pools hold how much of a chain, as long as their leases last."""

from __future__ import annotations

import asyncio
import hashlib
import random

import pytest

from memsvc.store import HintOwner, HintTicket, Store, StoreFencedError
from tests.store.conftest import Kind

LONG = 60.0


def owner(name: str) -> HintOwner:
    """Returns a pool."""
    return HintOwner(name, 2**63 + 1, f"{name}:50071", "memsvc-1", 2**64 - 1, "memsvc:50061")


def chain(seed: int, length: int) -> list[bytes]:
    """Returns identities."""
    return [hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=16).digest() for number in range(length)]


async def found(store: Store, identities: list[bytes], space: str = "s") -> dict[str, int]:
    """Returns how deep each pool is."""
    matches = await store.hints.find(space, b"".join(identities))
    assert len({match.owner for match in matches}) == len(matches)
    return {match.owner.pool_id: match.depth for match in matches}


async def joined(store: Store, name: str, identities: list[bytes], ttl: float = LONG) -> HintTicket:
    """Adds a pool that holds `identities`."""
    ticket = await store.hints.join("s", owner(name), 100, ttl)
    await store.hints.update(ticket, 0, b"".join(identities), b"")
    return ticket


async def test_each_pool_is_found_as_deep_as_it_goes(store: Store) -> None:
    """Otherwise requests go where less of their prefix is."""
    path = chain(0, 1000)
    for number, depth in enumerate([1, 3, 3, 500, 999, 1000]):
        await joined(store, f"p{number}", path[:depth])
    await joined(store, "other", chain(1, 10))
    assert await found(store, path) == {"p0": 1, "p1": 3, "p2": 3, "p3": 500, "p4": 999, "p5": 1000}
    assert await found(store, path[:400]) == {"p0": 1, "p1": 3, "p2": 3, "p3": 400, "p4": 400, "p5": 400}
    assert await found(store, chain(2, 5)) == {}
    assert await found(store, []) == {}
    assert await found(store, path, space="elsewhere") == {}


async def test_a_match_names_its_owner_completely(store: Store) -> None:
    """Otherwise nobody can go there."""
    path = chain(0, 2)
    await joined(store, "p", path)
    (match,) = await store.hints.find("s", b"".join(path))
    assert match.owner == owner("p")


async def test_what_is_removed_is_not_found(store: Store) -> None:
    """Otherwise evicted blocks draw requests forever."""
    path = chain(0, 8)
    first, second = await joined(store, "p", path), await joined(store, "q", path)
    await store.hints.update(first, 1, b"", b"".join(path[4:]))
    assert await found(store, path) == {"p": 4, "q": 8}
    await store.hints.update(second, 1, b"", b"".join(path))
    await store.hints.update(first, 2, b"".join(path[4:6]), b"".join(path[6:]))
    assert await found(store, path) == {"p": 6}


async def test_hints_vanish_with_the_lease(store: Store) -> None:
    """Otherwise a dead pool is recommended until every entry of it is gone."""
    path = chain(0, 4)
    ticket = await joined(store, "p", path, ttl=0.15)
    await joined(store, "q", path[:2])
    assert await found(store, path) == {"p": 4, "q": 2}
    await store.hints.renew(ticket, 1, 0.15)
    await asyncio.sleep(0.25)
    assert await found(store, path) == {"q": 2}
    with pytest.raises(StoreFencedError):
        await store.hints.renew(ticket, 1, LONG)
    with pytest.raises(StoreFencedError):
        await store.hints.update(ticket, 1, b"".join(path), b"")


async def test_hints_vanish_at_once_when_withdrawn(store: Store) -> None:
    """Otherwise a service that stops in good order is looked for until its lease is over."""
    path = chain(0, 4)
    ticket = await joined(store, "p", path)
    await store.hints.leave(ticket)
    assert await found(store, path) == {}


async def test_a_pool_that_joins_again_starts_with_nothing(store: Store) -> None:
    """Otherwise what it lost in between is still hinted at."""
    path = chain(0, 4)
    older = await joined(store, "p", path)
    await joined(store, "p", path[:2])
    assert await found(store, path) == {"p": 2}
    with pytest.raises(StoreFencedError):
        await store.hints.update(older, 1, b"".join(path), b"")


async def test_a_writer_that_missed_an_update_is_fenced(store: Store) -> None:
    """Otherwise a server that was set back is written to as if it had everything."""
    ticket = await joined(store, "p", chain(0, 2))
    for wrong in (0, 2):
        with pytest.raises(StoreFencedError):
            await store.hints.update(ticket, wrong, b"", b"")
        with pytest.raises(StoreFencedError):
            await store.hints.renew(ticket, wrong, LONG)
    await store.hints.update(ticket, 1, b"", b"")


async def test_a_writer_finds_out_that_the_index_is_gone(kind: Kind) -> None:
    """Otherwise a flushed server stays empty."""
    path = chain(0, 3)
    ticket = await joined(kind.store, "p", path)
    kind.flush()
    with pytest.raises(StoreFencedError):
        await kind.store.hints.renew(ticket, 1, LONG)
    assert await found(kind.store, path) == {}
    await joined(kind.store, "p", path)
    assert await found(kind.store, path) == {"p": 3}


async def test_the_sweep_forgets_the_dead_alone(kind: Kind) -> None:
    """Otherwise entries of dead pools pile up, or those of live ones go with them."""
    path = chain(0, 300)
    dead, _ = await joined(kind.store, "dead", path), await joined(kind.store, "live", path[:100])
    await kind.store.hints.leave(dead)
    for _ in range(1000):
        if not await kind.store.hints.sweep("s"):
            break
    else:
        pytest.fail("the sweep does not end")
    assert await found(kind.store, path) == {"live": 100}
    assert not await kind.store.hints.sweep("s")


@pytest.mark.parametrize("kind", ["redis", "cluster"], indirect=True)
async def test_an_index_that_is_full_begins_again_with_more_buckets(kind: Kind) -> None:
    """Otherwise buckets grow out of the compact encoding, or every lookup reads a long one."""
    hints = kind.store.hints
    path = chain(0, 50)
    small = await joined(kind.store, "small", path)
    large = await hints.join("s", owner("large"), 100_000, LONG)
    assert large.bucket_count * 64 >= 300_000
    with pytest.raises(StoreFencedError):
        await hints.renew(small, 1, LONG)
    again = await joined(kind.store, "small", path)
    assert again.bucket_count == large.bucket_count
    assert await found(kind.store, path) == {"small": 50}
    while await hints.sweep("s"):
        pass
    assert await found(kind.store, path) == {"small": 50}


async def test_random_updates_leave_what_a_plain_set_would(store: Store) -> None:
    """Otherwise some order of additions and removals leaves an entry behind."""
    random_source = random.Random(7)
    paths = [chain(seed, 12) for seed in range(6)]
    names = ["a", "b", "c"]
    tickets = {name: (await joined(store, name, []), 1) for name in names}
    held: dict[str, dict[int, int]] = {name: dict.fromkeys(range(6), 0) for name in names}
    for _ in range(60):
        name, seed = random_source.choice(names), random_source.randrange(6)
        before, after = held[name][seed], random_source.randrange(13)
        path = paths[seed]
        ticket, count = tickets[name]
        await store.hints.update(ticket, count, b"".join(path[before:after]), b"".join(path[after:before]))
        tickets[name], held[name][seed] = (ticket, count + 1), after
        if random_source.random() < 0.1:
            tickets[name] = (await joined(store, name, []), 1)
            held[name] = dict.fromkeys(range(6), 0)
        for probe in range(6):
            expected = {name: held[name][probe] for name in names if held[name][probe]}
            assert await found(store, paths[probe]) == expected
