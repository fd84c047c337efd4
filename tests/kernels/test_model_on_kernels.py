"""The whole model on the Triton kernels, run by the interpreter."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from execsvc.gpu.operations import TritonOperations
from execsvc.kv_cache import KVCache
from execsvc.model.layers import Rotary
from kernels import configs
from kernels.layout import KVLayout
from tests.unit.execsvc import tiny
from tests.unit.execsvc.recorded_graphs import RecordingRuntime
from tests.unit.execsvc.tiny import Driver, start

SMALL = dataclasses.replace(tiny.CONFIG, num_layers=1)


def test_the_triton_backend_gives_the_tokens_of_the_torch_backend(kernels: Any) -> None:
    """Otherwise `--attention-backend triton` would be a flag that nobody has tried. Covers a step that mixes both."""
    prompts = {1: [(7 * i) % 311 for i in range(37)], 2: [(5 * i) % 311 for i in range(16)]}
    drivers = [Driver(tiny.engine_of(backend=backend, blocks=12)) for backend in ("torch", "triton")]
    for driver in drivers:
        driver.run({1: 20}, added=[start(1, prompts[1], [1, 3, 5])])
        driver.run({1: 17, 2: 16}, added=[start(2, prompts[2], [7, 8])])
        driver.run({1: 1}, added=[start(3, prompts[2][:9], [9])])
        driver.run({2: 1, 1: 1, 3: 9})
    assert drivers[0].tokens == drivers[1].tokens
    for table, logits in drivers[0].logits.items():
        for mine, theirs in zip(logits, drivers[1].logits[table], strict=True):
            assert (mine - theirs).abs().max() < 1e-4


def test_attention_is_the_same_in_company_where_that_was_asked_for(kernels: Any) -> None:
    """Otherwise `--batch-invariant` promises what it does not do. Without it company shows: it is needed."""
    generator = torch.Generator().manual_seed(5)
    layout = KVLayout(60, 1, 2, 16, 32, torch.float32)
    cache = KVCache(layout, torch.device("cpu"))
    cache.data.copy_(torch.randn(layout.shape, generator=generator))
    lens = torch.tensor([600, 33, 200], dtype=torch.int32)
    tables = torch.arange(1, 60, dtype=torch.int32).repeat(3, 1)
    q = torch.randn(3, 4, 32, generator=generator)
    same = {}
    for invariant_len in (0, 1024):
        rotary = Rotary.build(torch.ones(16), 1, cache.device)
        operations = TritonOperations(cache, rotary, 4, 0, 3, invariant_len)
        rows = [operations.attend_last(0, q[:count], tables[:count], lens[:count])[0].clone() for count in (1, 3)]
        same[invariant_len] = torch.equal(*rows)
        assert torch.allclose(*rows, atol=1e-5)
    assert same == {0: False, 1024: True}


def test_a_prefix_that_sequences_share_is_read_once_with_the_same_result(kernels: Any) -> None:
    """What the kernels make of groups must be what sequences alone get, in replays and in steps with chunks."""
    prompt = [(7 * i) % 311 for i in range(48)]
    drivers = []
    with configs.override("cascade", {"groups": 2, "group_tokens": 16, "step_kib": 1}):
        for operations in ("torch", "triton"):
            engine = tiny.gpu_engine_of(SMALL, operations=operations, runtime=RecordingRuntime(), sizes=[4], blocks=20)
            drivers.append(Driver(engine))
    steps: Any = drivers[1].engine._steps
    grouped: list[bool] = []
    select = steps._groups.select
    steps._groups.select = lambda *arguments: grouped.append(select(*arguments)) or grouped[-1]
    for driver in drivers:
        driver.run({1: 48}, added=[start(1, prompt, [3, 1, 2, 4])])
        forks = [start(table, [*prompt, table], [3, 1, 2, 3 + table], 48) for table in (2, 3)]
        driver.run({1: 1, 2: 1, 3: 1}, added=forks)
        driver.run({1: 1, 2: 1, 3: 1})
        driver.run({1: 1, 2: 1, 3: 1, 4: 9}, added=[start(4, prompt[:9], [9])])
        driver.run({3: 1, 4: 1})
        driver.run({4: 1, 2: 1, 3: 1})
    assert grouped == [False, True, True, True, False, True]
    assert drivers[0].tokens == drivers[1].tokens
    for table, logits in drivers[0].logits.items():
        for mine, theirs in zip(logits, drivers[1].logits[table], strict=True):
            assert (mine - theirs).abs().max() < 1e-4


def test_prefixes_are_left_alone_where_results_must_not_depend_on_company(kernels: Any) -> None:
    """With `--batch-invariant`, with a window, and where it was refused, nobody may be grouped."""
    cache = KVCache(KVLayout(4, 1, 2, 16, 32, torch.float32), torch.device("cpu"))
    rotary = Rotary.build(torch.ones(16), 1, cache.device)
    assert TritonOperations(cache, rotary, 4, 0, 3).groups is not None
    for window, invariant_len, cascade, heads in (
        (0, 64, True, 4),
        (32, 0, True, 4),
        (0, 0, False, 4),
        (0, 0, True, 66),
    ):
        found = TritonOperations(cache, rotary, heads, window, 3, invariant_len, cascade=cascade)
        assert found.groups is None
