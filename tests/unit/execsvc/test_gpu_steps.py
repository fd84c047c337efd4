"""Steps as on a GPU, on CPU tensors: what graphs, deltas and steps in flight do must not show in any token."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
import dataclasses
import random
from typing import Any

import numpy as np
import pytest
import torch

from execsvc.engine import Engine, PendingStep
from execsvc.gpu.ladder import ladder, rung_of_size
from execsvc.gpu.runtime import EagerEvent, EagerGraph, EagerRuntime, Graph
from execsvc.gpu.sampling import TorchSampler, uniform
from execsvc.gpu.staging import Staging
from execsvc.grammars import Grammars
from execsvc.philox import uniform as philox_uniform
from execsvc.sampler import SamplingSpec, sample
from kernels.step_state.tensors import PARAMETERS
from protos.execsvc.v1 import execsvc_pb2 as pb
from quire import columns
from tests.unit.execsvc import tiny
from tests.unit.execsvc.recorded_graphs import RecordingRuntime
from tests.unit.execsvc.test_grammars import EOS_TOKEN, JSON
from tests.unit.execsvc.tiny import Driver, start

SMALL = dataclasses.replace(tiny.CONFIG, num_layers=2)
BLOCK_SIZE = 16
FLOATS = columns.pack_floats([4.0, -30.0])
GRAMMAR = 'start: /[a-f]{2,9}/ "-" /[0-9]{1,7}/'


class Life:
    """Random plans over a few sequences: the same seed gives the same plans, whoever runs them."""

    def __init__(self, seed: int, block_count: int = 64) -> None:
        self.random = random.Random(seed)
        self.free = list(range(1, block_count))
        self.random.shuffle(self.free)
        self.open: dict[int, dict[str, Any]] = {}
        self.next_table = 1
        self.step = 0

    def _start(self, plan: pb.StepPlan) -> None:
        draw = self.random
        count = draw.choice([1, 5, 15, 16, 17, 33])
        blocks = [self.free.pop() for _ in range(-(-(count + 1) // BLOCK_SIZE))]
        sampling = draw.choice(
            [
                {},
                {},
                {"temperature": 0.9, "seed": draw.getrandbits(64)},
                {"temperature": 1.2, "top_k": 9},
                {"temperature": 0.8, "repetition_penalty": 1.4, "presence_penalty": 0.5, "prompt_token_count": count},
                {"frequency_penalty": 1.5, "bias_tokens": columns.pack([7, 9]), "bias_values": FLOATS, "logprobs": 3},
                {"temperature": 2.0, "typical_p": 0.6, "withheld_tokens": columns.pack([1, 9]), "withheld_until": 30},
                {"temperature": 1.0, "typical_p": 0.4, "top_k": 90, "bias_tokens": columns.pack([5]), "logprobs": 0}
                | {"bias_values": FLOATS[:4], "withheld_tokens": columns.pack([5, 6]), "withheld_until": 12},
                {"logprobs": 20, "prompt_logprobs": draw.choice([0, 2]), "prompt_token_count": count},
                {"temperature": 1.4, "grammar": GRAMMAR, "prompt_token_count": count, "logprobs": 1},
            ]
        )
        tokens = [draw.randrange(320) for _ in range(count)]
        siblings = [draw.getrandbits(64) for _ in range(draw.choice([0, 0, 2]))]
        plan.added.append(start(self.next_table, tokens, blocks, sibling_seeds=siblings, **sampling))
        self.open[self.next_table] = {"known": count, "computed": 0, "blocks": blocks}
        self.next_table += 1

    def plan(self) -> pb.StepPlan:
        """Returns the next plan."""
        draw, self.step = self.random, self.step + 1
        plan, appended, scheduled = pb.StepPlan(step=self.step, epoch=1), [], {}
        if self.open and draw.random() < 0.1:
            table = draw.choice(list(self.open))
            plan.removed = columns.pack([table])
            self.free = self.open.pop(table)["blocks"] + self.free
        if len(self.open) < 7 and draw.random() < 0.3:
            self._start(plan)
        for table, sequence in self.open.items():
            if draw.random() < 0.15:
                continue
            rest = sequence["known"] - sequence["computed"]
            count = rest if draw.random() < 0.7 else draw.randint(1, rest)
            sequence["computed"] += count
            if sequence["computed"] == sequence["known"]:
                sequence["known"] += 1
            if sequence["known"] > len(sequence["blocks"]) * BLOCK_SIZE:
                appended += [table, len(sequence["blocks"]), self.free[0]]
                sequence["blocks"].append(self.free.pop(0))
            scheduled[table] = count
        # Blocks are granted a step ahead: the next token's slot must be there when its step is planned.
        plan.appended = columns.pack(appended)
        plan.scheduled_tables, plan.scheduled_counts = columns.pack(scheduled), columns.pack(scheduled.values())
        return plan


def run_life(engine: Engine, seed: int, steps: int, depth: int = 1) -> list[bytes]:
    """Returns the results of random plans, with up to `depth` steps submitted before the first is collected."""
    life, results, flying = Life(seed), [], deque[PendingStep]()
    engine.grammars = Grammars(JSON, SMALL.vocab_size, [EOS_TOKEN])

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


def assert_alike(found: list[bytes], expected: list[bytes]) -> int:
    """Checks that results are equal but for the last digits of log-probabilities; returns how many there are."""
    count = 0
    for mine, theirs in zip(map(pb.StepResult.FromString, found), map(pb.StepResult.FromString, expected), strict=True):
        values = [columns.unpack_floats(result.logprobs.values, "") for result in (mine, theirs)]
        assert values[0] == pytest.approx(values[1], abs=1e-4)
        if values[0]:
            mine.logprobs.values = theirs.logprobs.values
        assert mine == theirs
        count += len(values[0])
    return count


@pytest.mark.parametrize("seed", [1, 5, 6])
def test_steps_as_on_a_gpu_give_the_tokens_of_the_cpu(seed: int) -> None:
    """Otherwise a GPU would answer something else. Chunks, decodes, both in one step, growth, all ways of choosing."""
    expected = run_life(tiny.engine_of(SMALL, max_num_seqs=8), seed, 60)
    found = run_life(tiny.gpu_engine_of(SMALL, runtime=RecordingRuntime(), sizes=[2, 8]), seed, 60)
    assert assert_alike(found, expected) > 100


def test_many_small_portions_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt with penalties, a thousand siblings: what no buffer holds at once must all arrive."""
    expected = run_life(tiny.engine_of(SMALL, max_num_seqs=8), 7, 40)
    monkeypatch.setattr("execsvc.gpu.steps._WRITE_ROOM", 8)
    engine = tiny.gpu_engine_of(SMALL)
    monkeypatch.setattr("execsvc.gpu.changes._PORTION", 5)
    steps: Any = engine._steps
    steps._max_num_seqs = 1
    assert assert_alike(run_life(engine, 7, 40), expected) > 100


class LoggingRuntime(EagerRuntime):
    """Notes replays and waits, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []
        self._captures = False

    def capture(self, work: Callable[[], None]) -> Graph:
        """Returns a graph with the name of its work."""
        log, name = self.log, work.__name__
        self._captures = True

        class Logged(EagerGraph):
            def replay(self) -> None:
                log.append(name)
                super().replay()

        return Logged(work)

    def event(self) -> Any:
        """Returns an event that tells when it is waited for, if it is of a step and not of a pinned buffer."""
        if not self._captures:
            return EagerEvent()
        log = self.log

        class Logged(EagerEvent):
            def synchronize(self) -> None:
                log.append("wait")

        return Logged()


def _flying(runtime: LoggingRuntime, starts: list[pb.SequenceStart]) -> list[str]:
    """Returns what is done while two decode steps of two sequences are submitted, none of them collected."""
    engine = tiny.gpu_engine_of(SMALL, runtime=runtime, sizes=[2])
    engine.grammars = Grammars(JSON, SMALL.vocab_size, [EOS_TOKEN])
    driver = Driver(engine)
    driver.run({1: 4, 2: 3}, added=starts)
    engine.observe_logits = None
    runtime.log.clear()
    decode = {"scheduled_tables": columns.pack([1, 2]), "scheduled_counts": columns.pack([1, 1])}
    flying = [engine.submit(pb.StepPlan(step=step, epoch=1, **decode)) for step in (2, 3)]
    done = list(runtime.log)
    for pending in flying:
        pending.wait()
        assert not engine.collect(pending).errors
    return done


@pytest.mark.parametrize(
    "sampling",
    [
        {"repetition_penalty": 1.4},
        {"frequency_penalty": 0.4, "temperature": 1.0},
        {"bias_tokens": columns.pack([3]), "bias_values": FLOATS[:4]},
        {"typical_p": 0.5, "temperature": 1.0},
        {"logprobs": 20},
        {"withheld_tokens": columns.pack([3]), "withheld_until": 100},
    ],
    ids=lambda sampling: next(iter(sampling)),
)
def test_whatever_is_asked_for_the_host_waits_for_nothing(sampling: dict[str, Any]) -> None:
    """One request with a penalty must not keep every other one of its batch from running ahead."""
    done = _flying(LoggingRuntime(), [start(1, range(4), [1], **sampling), start(2, range(3), [2])])
    assert done == ["body", "full_tail"] * 2


def test_a_grammar_waits_while_the_next_step_is_computed() -> None:
    """Its mask needs the last token: the device must have the next forward pass of all of them to do meanwhile."""
    constrained = start(1, range(4), [1], prompt_token_count=4)
    constrained.sampling.grammar = GRAMMAR
    done = _flying(LoggingRuntime(), [constrained, start(2, range(3), [2])])
    assert done == ["body", "wait", "full_tail"] * 2


def test_the_device_counts_what_penalties_need() -> None:
    """A count that drifts shows many tokens later, in another text: rows are used again, sequences come back."""
    engine = tiny.gpu_engine_of(SMALL, runtime=RecordingRuntime(), sizes=[4])
    driver = Driver(engine)
    penalties = {"repetition_penalty": 1.2, "prompt_token_count": 5}
    prompt = [3, 3, 319, 0, 7]
    driver.run({1: 5, 2: 5}, added=[start(1, prompt, [1, 4]), start(2, prompt, [2, 5], **penalties)])
    for _ in range(6):
        driver.run({1: 1, 2: 1})
    known = [*prompt, *driver.tokens[2]]
    driver.run({3: 5}, removed=[1, 2], added=[start(3, prompt[::-1], [3], frequency_penalty=0.5, prompt_token_count=5)])
    again = start(4, known, [6, 7], **penalties)
    driver.run({4: len(known), 3: 1}, added=[again])
    driver.run({4: 1, 3: 1})
    steps: Any = engine._steps
    for table, tokens in ((3, prompt[::-1] + driver.tokens[3]), (4, known + driver.tokens[4])):
        expected = 2 * torch.bincount(torch.tensor(tokens[5:]), minlength=SMALL.vocab_size)
        expected[torch.tensor(tokens[:5])] += 1
        assert torch.equal(steps._changes.seen[engine._rows.by_table[table].row].long(), expected)


@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("seed", [2, 8])
def test_steps_in_flight_change_nothing(depth: int, seed: int) -> None:
    """The next step is launched before the tokens of the last are known: it must go on from the right ones."""
    expected = run_life(tiny.gpu_engine_of(SMALL), seed, 60)
    assert run_life(tiny.gpu_engine_of(SMALL), seed, 60, depth) == expected


def test_a_replay_equals_the_same_step_launched_piece_by_piece() -> None:
    """A graph must take lengths, tables and tokens from memory, not from the time of its capture."""
    piecewise = tiny.gpu_engine_of(SMALL, sizes=[])
    replayed = tiny.gpu_engine_of(SMALL, runtime=RecordingRuntime(), sizes=[1, 2, 4, 8])
    drivers = [Driver(piecewise), Driver(replayed)]
    for driver in drivers:
        driver.run({1: 20, 2: 3}, added=[start(1, range(20), [4, 2]), start(2, range(50, 53), [9])])
        for _ in range(12):
            driver.run({2: 1, 1: 1})
        driver.run({1: 1}, appended=[1, 2, 30])
    assert drivers[0].tokens == drivers[1].tokens
    for table, logits in drivers[0].logits.items():
        for mine, theirs in zip(logits, drivers[1].logits[table], strict=True):
            assert (mine - theirs).abs().max() < 1e-4


def test_deltas_leave_the_device_with_the_host_s_tables() -> None:
    """Otherwise a sequence would read or write another one's block some steps later."""
    engine = tiny.gpu_engine_of(SMALL)
    run_life(engine, 3, 80)
    # What changed in the last step goes with the next one.
    steps: Any = engine._steps
    engine.apply(
        pb.StepPlan(
            step=99,
            epoch=1,
            added=[start(9999, [1], [63])],
            scheduled_tables=columns.pack([9999]),
            scheduled_counts=columns.pack([1]),
        )
    )
    resident, rows = steps._resident, engine._rows
    assert rows.by_table
    for sequence in rows.by_table.values():
        row, count = sequence.row, int(rows.block_counts[sequence.row])
        assert resident.tables[row, :count].tolist() == rows.block_tables[row, :count].tolist()
        assert int(resident.computed[row]) == rows.computed[row]
        if rows.known[row] == rows.computed[row] + 1:
            assert int(resident.tokens[row]) == rows.last_token[row]


def test_padding_writes_nothing_and_reads_nothing_stale() -> None:
    """Rows of a longer batch before must not come back as padding: they would write to blocks of others."""
    engine = tiny.gpu_engine_of(SMALL, runtime=RecordingRuntime(), sizes=[8])
    driver = Driver(engine)
    starts = [start(table, [table] * 5, [table]) for table in range(1, 8)]
    driver.run(dict.fromkeys(range(1, 8), 5), added=starts)
    driver.run(dict.fromkeys(range(1, 8), 1))
    before = engine._cache.data.clone()
    state: Any = engine._steps
    computed = state._resident.computed.clone()
    driver.run({3: 1})
    changed = (engine._cache.data != before).flatten(1).any(1).nonzero()[:, 0].tolist()
    assert changed == [3]
    assert int((state._resident.computed != computed).sum()) == 1
    assert not engine._cache.data[0].any()


def test_logits_that_are_not_finite_fail_one_sequence_while_its_next_step_is_in_flight() -> None:
    """One poisoned sequence must neither stop the others nor feed an impossible token to the next step."""
    engine = tiny.gpu_engine_of(SMALL)
    driver = Driver(engine)
    driver.run({1: 17, 2: 5}, added=[start(1, range(17), [1, 2]), start(2, range(5), [3])])
    engine._cache.data[1] = float("nan")
    decode = {"scheduled_tables": columns.pack([1, 2]), "scheduled_counts": columns.pack([1, 1])}
    flying = [engine.submit(pb.StepPlan(step=step, epoch=1, **decode)) for step in (2, 3)]
    first, second = (engine.collect(pending) for pending in flying)
    assert [(error.table, error.reason) for error in first.errors] == [(1, "LOGITS_NOT_FINITE")]
    assert [(error.table, error.reason) for error in second.errors] == [(1, "SEQUENCE_NOT_FOUND")]
    for result in (first, second):
        assert columns.unpack_list(result.sampled_tables, "") == [2]
        assert columns.unpack_list(result.written_tables, "") == [2]
    assert engine.open_tables == [2]


def test_withheld_tokens_are_not_chosen_in_a_replay_either() -> None:
    """Otherwise `min_tokens` would depend on whether a batch was captured."""
    found = []
    for engine in (tiny.engine_of(SMALL), tiny.gpu_engine_of(SMALL)):
        driver = Driver(engine)
        driver.run({1: 4}, added=[start(1, range(4), [1])])
        unwanted = driver.tokens[1][0]
        again = Driver(engine, step=1)
        held = start(2, range(4), [2])
        held.sampling.withheld_tokens, held.sampling.withheld_until = columns.pack(range(unwanted, unwanted + 1)), 9
        again.run({2: 4}, added=[held])
        for _ in range(8):
            again.run({2: 1})
        found.append(again.tokens[2])
        assert unwanted not in again.tokens[2][:5]
    assert found[0] == found[1]


def test_many_changes_go_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """More changes than a step has room for, a thousand long prompts at once, must all arrive."""
    monkeypatch.setattr("execsvc.gpu.steps._WRITE_ROOM", 8)
    expected = run_life(tiny.engine_of(SMALL, max_num_seqs=8), 4, 20)
    assert_alike(run_life(tiny.gpu_engine_of(SMALL), 4, 20), expected)


def test_the_ladder_has_few_sizes_and_covers_all() -> None:
    """Too few sizes waste work on padding, too many waste memory and start-up time."""
    assert ladder(1) == [1]
    assert ladder(20) == [1, 2, 4, 8, 16, 20]
    assert ladder(256)[:5] == [1, 2, 4, 8, 16]
    assert ladder(256)[-2:] == [248, 256]
    assert ladder(300)[-4:] == [256, 272, 288, 300]
    rungs = rung_of_size(ladder(300))
    assert len(rungs) == 301
    assert all(size <= rung for size, rung in enumerate(rungs))
    assert [rungs[size] for size in (1, 3, 5, 257, 289)] == [1, 4, 8, 272, 300]


def test_draws_on_the_device_have_the_bits_of_the_host() -> None:
    """The same seed and position must give the same token, whichever device draws."""
    generator = np.random.default_rng(5)
    seeds = generator.integers(0, 2**64, 50, dtype=np.uint64)
    positions = generator.integers(0, 2**20, 50, dtype=np.uint64)
    words = torch.from_numpy(np.stack([seeds & 0xFFFFFFFF, seeds >> 32]).astype(np.uint32).view(np.int32))
    found = uniform(words, torch.from_numpy(positions.astype(np.int32)))
    assert found.tolist() == philox_uniform(seeds, positions).tolist()


def test_the_device_chooses_what_the_host_chooses() -> None:
    """Every option alone and together, ties included: a request must not change its text with the device."""
    logits = torch.randn(16, 200, generator=torch.Generator().manual_seed(3)).mul(3).round(decimals=1)
    options: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {},
        {"top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"top_k": 50, "top_p": 0.8, "min_p": 0.01},
        {"top_k": 1},
        {"top_p": 1e-6},
        {"top_k": 10**6},
        {"temperature": 0.3},
        {"temperature": 50.0},
        {"min_p": 1.0},
        {"typical_p": 0.5},
        {"typical_p": 0.3, "top_k": 20, "temperature": 2.0},
        {"typical_p": 1e-6},
        {"typical_p": 0.9, "top_p": 0.9, "min_p": 0.05},
    ]
    for round_index in range(5):
        specs = [
            SamplingSpec(**{"temperature": 1.0, "seed": 2**63 + index * 977, **some})
            for index, some in enumerate(options)
        ]
        positions = [round_index * 7 + index for index in range(16)]
        engine = tiny.gpu_engine_of(SMALL, max_num_seqs=16, sizes=[])
        observer: Any = engine._steps.row_observer
        for row, spec in enumerate(specs):
            observer.row_added(row, np.zeros(1, dtype=np.int64), 0, spec)
        params = torch.from_numpy(observer._columns[2:].copy())
        assert len(params) == len(PARAMETERS)
        out = torch.zeros(16, dtype=torch.int32)
        TorchSampler().sample(logits, params, torch.tensor(positions, dtype=torch.int32), out)
        assert out.tolist() == sample(logits, specs, positions)
    logits[3] = float("nan")
    TorchSampler().most_likely(logits, out)
    assert out[3] == -1


def test_a_pinned_buffer_waits_for_its_copy() -> None:
    """A buffer that is filled again too early would send the next step's rows with this one's."""
    waited: list[int] = []

    class Events(EagerRuntime):
        """Events that tell when they are waited for."""

        made = 0

        def event(self) -> Any:
            """Returns an event with a number."""
            number, self.made = self.made, self.made + 1

            class Numbered(EagerEvent):
                def synchronize(self) -> None:
                    waited.append(number)

            return Numbered()

    staging = Staging(Events(), 8, depth=2)
    for turn in range(4):
        staging.begin()
        words = staging.put(np.array([turn, turn]), 3, fill=-1)
        staging.send()
        assert words.tolist() == [turn, turn, -1]
    assert waited == [1, 0]
