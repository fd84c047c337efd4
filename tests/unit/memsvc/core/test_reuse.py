"""What caches of other sizes would have found, against caches of these sizes."""

from __future__ import annotations

import random

import numpy as np
import pytest

from memsvc.core.reuse import ReuseTrace, earlier_greater

SIZES = [1, 2, 5, 9, 17, 33, 65, 1000]


def identity(number: int) -> bytes:
    """Returns the identity of a block."""
    return random.Random(number).randbytes(16)


class Cache:
    """A cache of so many blocks that evicts the one that was touched least recently."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.blocks: list[bytes] = []

    def touch(self, block: bytes) -> bool:
        """Touches a block; returns whether it was there."""
        there = block in self.blocks
        if there:
            self.blocks.remove(block)
        self.blocks = [*self.blocks, block][-self.size :]
        return there

    def ask(self, blocks: list[bytes]) -> int:
        """Touches the blocks of a prompt; returns how many of them are found, up to the first that is not."""
        hits = [self.touch(block) for block in blocks]
        return hits.index(False) if False in hits else len(hits)


def traffic(seed: int, count: int, prompts: int) -> list[tuple[str, list[bytes]]]:
    """Returns touches: prompts that share beginnings, what they leave behind, and now and then an emptied cache."""
    source = random.Random(seed)
    known = [[identity(1000 * number + at) for at in range(source.randint(1, 12))] for number in range(prompts)]
    found: list[tuple[str, list[bytes]]] = []
    for _ in range(count):
        chosen = source.choice(known)[: source.randint(1, 12)]
        found += [("ask", chosen), ("touch", chosen[::-1])] if source.random() < 0.98 else [("forget", [])]
        if source.random() < 0.2:
            # Blocks whose beginning may be gone.
            found.append(("touch", source.choice(known)[-2:]))
    return found


def shares(events: list[tuple[str, list[bytes]]], sizes: list[int]) -> list[float]:
    """Returns which share of the blocks asked for caches find."""
    result = []
    for size in sizes:
        cache, found, asked = Cache(size), 0, 0
        for kind, blocks in events:
            if kind == "ask":
                found, asked = found + cache.ask(blocks), asked + len(blocks)
            elif kind == "touch":
                for block in blocks:
                    cache.touch(block)
            else:
                cache.blocks = []
        result.append(found / asked)
    return result


def traced(events: list[tuple[str, list[bytes]]], limit: int) -> ReuseTrace:
    """Returns a trace of touches."""
    trace = ReuseTrace(limit)
    for kind, blocks in events:
        if kind == "forget":
            trace.forget()
        else:
            getattr(trace, kind)(blocks)
    return trace


@pytest.mark.parametrize("seed", range(6))
def test_every_size_finds_what_a_cache_of_that_size_finds(seed: int) -> None:
    """Otherwise an operator buys memory that finds nothing, or saves what would."""
    events = traffic(seed, 150, 12)
    trace = traced(events, 10**6)
    found, endless = trace.found(SIZES)
    assert found == shares(events, SIZES)
    assert endless == found[-1]
    assert trace.sampled_share == 1


def test_a_sample_comes_close_to_the_whole_and_stays_within_its_bound() -> None:
    """Otherwise a busy service needs memory without an end to answer, or the answer is wrong."""
    events = traffic(1, 4000, 600)
    whole, sample = traced(events, 10**6), traced(events, 6000)
    assert sample.sampled_share < 1
    assert len(sample._needed()) <= 6000
    sizes = [200, 800, 2000]
    assert np.abs(np.array(sample.found(sizes)[0]) - whole.found(sizes)[0]).max() < 0.05


def test_what_was_never_asked_for_is_no_share_of_anything() -> None:
    """Otherwise a service that has just started divides by zero."""
    trace = ReuseTrace()
    assert trace.found([1, 2]) == ([0.0, 0.0], 0.0)
    trace.touch([identity(1)])
    trace.ask([])
    assert trace.found([1]) == ([0.0], 0.0)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 100])
def test_greater_values_before_are_counted(count: int) -> None:
    """Otherwise every distance is wrong."""
    values = np.random.default_rng(count).integers(-1, count, count)
    expected = [int((values[:at] > value).sum()) for at, value in enumerate(values)]
    assert earlier_greater(values).tolist() == expected
