"""The whole model on the Triton kernels, run by the interpreter."""

from __future__ import annotations

from typing import Any

import torch

from execsvc.gpu.operations import TritonOperations
from execsvc.kv_cache import KVCache
from execsvc.model.layers import Rotary
from kernels.layout import KVLayout
from tests.unit.execsvc import tiny
from tests.unit.execsvc.tiny import Driver, start


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
