"""Slots of host memory under random requests, cancels, steps in flight, and other gateways that take some.

The scheduler runs on the memory core and on an executor that checks what every slot holds; here it is checked besides,
after every action, that no slot is in two places and none is nowhere.
"""

from __future__ import annotations

from collections.abc import Callable
import random

import pytest

from gateway.core.precedence import SchedulingPolicy
from gateway.core.sequence import Sequence, SequenceState
from gateway.core.swapping import PreemptionMode, SwapSettings
from tests.conformance.scheduler_rig import SIZE, Rig

STEPS = 500
PREFIXES = [[], [9] * 40, [(7 * place) % 250 + 1 for place in range(3 * SIZE)]]


class SwapWalk:
    """A random walk in a pool that is too small for what runs."""

    def __init__(self, seed: int) -> None:
        self.random = chance = random.Random(seed)
        self.slot_count = chance.choice((6, 20, 80))
        rate = chance.choice((2e8, 1e12))
        mode = chance.choice((PreemptionMode.SWAP, PreemptionMode.AUTO))
        self.rig = Rig(
            chance.choice((8, 14)),
            depth=chance.choice((1, 2, 3)),
            budget=chance.choice((20, 64)),
            policy=chance.choice((SchedulingPolicy.FCFS, SchedulingPolicy.PRIORITY)),
            swap=SwapSettings(self.slot_count, rate, rate, mode),
        )
        self.actions: list[tuple[Callable[[], None], float]] = [
            (self.submit, 4.0),
            (self.rig.turn, 12.0),
            (self.plan, 2.0),
            (self.land, 2.0),
            (self.cancel, 0.3),
            (self.others, 0.3),
        ]

    def run(self) -> Rig:
        """Takes all steps, checking after each, and runs what is left to its end."""
        actions, weights = zip(*self.actions, strict=True)
        for _ in range(STEPS):
            self.random.choices(actions, weights)[0]()
            self.check()
        self.rig.executor.elsewhere = int
        self.rig.run()
        self.check()
        return self.rig

    def living(self) -> list[Sequence]:
        """Returns the sequences that have not ended."""
        return [sequence for sequence in self.rig.output if sequence.state is not SequenceState.FINISHED]

    def submit(self) -> None:
        """Queues a request that may begin as another one."""
        if len(self.living()) < 9:
            rest = [self.random.randrange(1, 250) for _ in range(self.random.randrange(1, 20))]
            prompt = [*self.random.choice(PREFIXES), *rest]
            self.rig.submit(prompt, max_tokens=self.random.randrange(10, 60), priority=self.random.randrange(3))

    def plan(self) -> None:
        """Sends a step off, if not too many are in flight."""
        if len(self.rig.in_flight) < 3:
            self.rig.plan()

    def land(self) -> None:
        """Takes a result in."""
        if self.rig.in_flight:
            self.rig.land()

    def cancel(self) -> None:
        """Ends somebody, wherever it is."""
        living = [sequence for sequence in self.living() if not sequence.ended]
        if living:
            self.rig.cancel(self.random.choice(living))

    def others(self) -> None:
        """Other gateways take slots, or give them back."""
        count = self.random.choice((0, 0, self.slot_count // 2, self.slot_count))
        self.rig.executor.elsewhere = lambda: count

    def check(self) -> None:
        """Every slot is free, or some one's, or about to be free; what the executor keeps is known here."""
        swapping = self.rig.scheduler.swapping
        records = [*swapping._away.values(), *swapping._returning.values()]
        slots = [*swapping._free, *swapping._let_go]
        for record in records:
            slots += record.slots
        assert sorted(slots) == list(range(self.slot_count))
        planned = {slot for draft, _ in self.rig.in_flight for slot in draft.swap_freed}
        assert not (set(self.rig.executor.host) & set(swapping._free)) - planned
        assert all(sequence.swapped is record for sequence, record in swapping._away.items())
        waiting = (SequenceState.WAITING, SequenceState.CLOSING)
        assert all(sequence.state in waiting for sequence in swapping._away)


@pytest.mark.parametrize("seed", range(16))
def test_no_slot_is_lost_or_given_twice(seed: int) -> None:
    """One leaks for every cancel at the wrong moment, or holds what two sequences take for theirs."""
    rig = SwapWalk(seed).run()
    for sequence, tokens in rig.output.items():
        assert tokens == rig.expected(sequence)[: len(tokens)]


def test_the_walks_come_by_what_they_are_to_check() -> None:
    """A walk that never swaps, shares or is refused proves nothing."""
    rigs = [SwapWalk(seed).run() for seed in range(8)]
    assert sum(rig.executor.swapped_out_count for rig in rigs) > 100
    assert sum(rig.executor.swapped_in_count for rig in rigs) > 50
    assert sum(rig.executor.refused_count for rig in rigs) > 0
    assert sum(rig.scheduler.swapping.stats.lost_count for rig in rigs) > 0
