"""The whole model on the Triton kernels, run by the interpreter."""

from __future__ import annotations

from typing import Any

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
