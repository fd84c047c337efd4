"""Steps in which prefixes that sequences share are read once: nobody may notice but by the time it takes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
import random
from typing import Any

import pytest

from execsvc.engine import Engine, PendingStep
from execsvc.gpu.runtime import Graph
from execsvc.prefix_tree import GroupRules
from protos.execsvc.v1 import execsvc_pb2 as pb
from quire import columns
from tests.unit.execsvc import tiny
from tests.unit.execsvc.recorded_graphs import RecordingRuntime
from tests.unit.execsvc.test_gpu_steps import SMALL
from tests.unit.execsvc.tiny import start

BLOCK_SIZE = 16
RULES = GroupRules(3, BLOCK_SIZE, 2 * BLOCK_SIZE)


class SharedLife:
    """Random plans over sequences that fork from one another: the same seed gives the same plans."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.free = list(range(1, 300))
        self.open: dict[int, dict[str, Any]] = {}
        self.holders: dict[int, int] = {}
        self.next_table = 1
        self.step = 0

    def _take(self) -> int:
        block = self.free.pop()
        self.holders[block] = 1
        return block

    def _let_go(self, block: int) -> None:
        self.holders[block] -= 1
        if not self.holders[block]:
            self.free.insert(0, block)

    def _start(self, plan: pb.StepPlan) -> None:
        draw = self.random
        blocks: list[int] = []
        if self.open and draw.random() < 0.75:
            parent = draw.choice(list(self.open.values()))
            full = parent["computed"] // BLOCK_SIZE
            blocks = parent["blocks"][: draw.randint(full // 2, full)]
        for block in blocks:
            self.holders[block] += 1
        computed, count = len(blocks) * BLOCK_SIZE, len(blocks) * BLOCK_SIZE + draw.choice([1, 9, 16, 40])
        blocks = blocks + [self._take() for _ in range(-(-(count + 1) // BLOCK_SIZE) - len(blocks))]
        sampling = draw.choice([{}, {}, {"temperature": 0.9, "seed": draw.getrandbits(64)}])
        tokens = [draw.randrange(320) for _ in range(count)]
        plan.added.append(start(self.next_table, tokens, blocks, computed, **sampling))
        self.open[self.next_table] = {"known": count, "computed": computed, "blocks": blocks}
        self.next_table += 1

    def _replace(self, table: int, appended: list[int], copies: list[int]) -> None:
        """Gives a table another block with the same content, as when equal blocks are merged or one is copied."""
        sequence = self.open[table]
        full = sequence["computed"] // BLOCK_SIZE
        if not full:
            return
        index, block = self.random.randrange(full), self._take()
        copies += [sequence["blocks"][index], block]
        self._let_go(sequence["blocks"][index])
        sequence["blocks"][index] = block
        appended += [table, index, block]

    def plan(self) -> pb.StepPlan:
        """Returns the next plan."""
        draw, self.step = self.random, self.step + 1
        plan, scheduled = pb.StepPlan(step=self.step, epoch=1), {}
        appended: list[int] = []
        copies: list[int] = []
        if self.open and draw.random() < 0.12:
            table = draw.choice(list(self.open))
            plan.removed = columns.pack([table])
            for block in self.open.pop(table)["blocks"]:
                self._let_go(block)
        elif self.open and draw.random() < 0.1:
            self._replace(draw.choice(list(self.open)), appended, copies)
        elif len(self.open) < 7 and draw.random() < 0.35:
            self._start(plan)
        for table, sequence in self.open.items():
            rest = sequence["known"] - sequence["computed"]
            count = rest if draw.random() < 0.8 else draw.randint(1, rest)
            sequence["computed"] += count
            if sequence["computed"] == sequence["known"]:
                sequence["known"] += 1
            if sequence["known"] > len(sequence["blocks"]) * BLOCK_SIZE:
                sequence["blocks"].append(self._take())
                appended += [table, len(sequence["blocks"]) - 1, sequence["blocks"][-1]]
            scheduled[table] = count
        plan.appended, plan.copies = columns.pack(appended), columns.pack(copies)
        plan.scheduled_tables, plan.scheduled_counts = columns.pack(scheduled), columns.pack(scheduled.values())
        return plan


def run_life(engine: Engine, seed: int, steps: int, depth: int = 1) -> list[bytes]:
    """Returns the results of random plans, with up to `depth` steps submitted before the first is collected."""
    life, results, flying = SharedLife(seed), [], deque[PendingStep]()

    def collect() -> None:
        pending = flying.popleft()
        pending.wait()
        result = engine.collect(pending)
        assert not result.errors, result.errors
        result.model_ns = result.sample_ns = 0
        results.append(result.SerializeToString(deterministic=True))

    for _ in range(steps):
        flying.append(engine.submit(life.plan()))
        if len(flying) == depth:
            collect()
    while flying:
        collect()
    return results


class CountingRuntime(RecordingRuntime):
    """Counts how often each of the captured graphs is replayed."""

    def __init__(self) -> None:
        super().__init__()
        self.replays: list[int] = []

    def capture(self, work: Callable[[], None]) -> Graph:
        """See Runtime."""
        inner, number, replays = super().capture(work), len(self.replays), self.replays
        replays.append(0)

        class Counted:
            def replay(self) -> None:
                replays[number] += 1
                inner.replay()

        return Counted()


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("depth", [1, 3])
def test_tokens_are_those_of_sequences_that_share_nothing(seed: int, depth: int) -> None:
    """Forks, removals, blocks that are replaced in the middle of a prefix, chunks and decodes in one step, replays."""
    expected = run_life(tiny.engine_of(SMALL, max_num_seqs=8), seed, 90)
    runtime = CountingRuntime()
    engine = tiny.gpu_engine_of(SMALL, runtime=runtime, sizes=[2, 8], group_rules=RULES)
    assert run_life(engine, seed, 90, depth) == expected
    # The largest size first; of each the grouped body, the body and two tails.
    assert sum(runtime.replays[0::4]) >= 5 and sum(runtime.replays[1::4]) >= 5, runtime.replays


def test_a_group_that_was_read_wrongly_would_be_noticed() -> None:
    """The other test must be able to fail: here everybody reads the first member's text one block too far."""
    expected = run_life(tiny.engine_of(SMALL, max_num_seqs=8), 1, 90)
    engine = tiny.gpu_engine_of(SMALL, sizes=[2, 8], group_rules=RULES)
    groups: Any = engine._steps._groups  # type: ignore[attr-defined]
    compose = groups._compose

    def wrong(*arguments: Any) -> bool:
        found: bool = compose(*arguments)
        groups._shared += BLOCK_SIZE
        return found

    groups._compose = wrong
    assert run_life(engine, 1, 90) != expected


def test_without_rules_or_with_one_sequence_nothing_is_grouped() -> None:
    """A rung of one has no second body, and an executor without groups captures none: each takes memory."""
    runtime = CountingRuntime()
    tiny.gpu_engine_of(SMALL, runtime=runtime, sizes=[1, 8], group_rules=RULES)
    assert len(runtime.replays) == 9
    runtime = CountingRuntime()
    tiny.gpu_engine_of(SMALL, runtime=runtime, sizes=[1, 8])
    assert len(runtime.replays) == 8
