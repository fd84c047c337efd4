"""What a request asks gives the same alone and in any company: on the real executor with a tiny model."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest

from gateway.session_service import SessionService
from tests.simulation.tiny_world import MAX_NUM_SEQS, TinyWorld, serving, write_model
from tests.simulation.wishes import Answer, Wish, all_alone, answer, make_wishes
from tests.simulation.world import engine_host, front_of

COUNT = 200
SEED = 7
DEMAND = MAX_NUM_SEQS * 10
"""Blocks that so many sequences of the longest kind would hold."""
SECONDS = 300.0
SETTINGS: dict[str, dict[str, Any]] = {
    "two steps deep": {"blocks": DEMAND // 4, "max_num_batched_tokens": 64, "pipeline_depth": 2, "fail_at": (90, 400)},
    "small chunks, priorities": {
        "blocks": DEMAND // 4,
        "max_num_batched_tokens": 24,
        "long_prefill_token_threshold": 7,
        "scheduling_policy": "priority",
        "pipeline_depth": 1,
    },
    "host memory, three steps deep": {
        "blocks": DEMAND // 4,
        "swap_space": "64MiB",
        "preemption_mode": "swap",
        "pipeline_depth": 3,
        "fail_at": (300,),
    },
    "through a front": {
        "blocks": DEMAND // 4,
        "max_num_batched_tokens": 64,
        "tenant_metadata": "tenant",
        "fail_at": (200,),
        "fronts": True,
    },
    "a forecast, fair shares, four steps deep": {
        "blocks": DEMAND // 2,
        "forecast": True,
        "scheduling_policy": "fair",
        "tenant_metadata": "tenant",
        "pipeline_depth": 4,
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the model is."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(model: str) -> list[tuple[Wish, list[Answer]]]:
    """Requests, each with what it gives alone."""

    async def ask() -> list[tuple[Wish, list[Answer]]]:
        async with serving(TinyWorld(model, 4 * DEMAND, pipeline_depth=1), SECONDS) as world:
            return [(wish, await all_alone(world, wish)) for wish in make_wishes(SEED, COUNT)]

    return asyncio.run(ask())


def difference(wish: Wish, found: list[Answer], whole: list[Answer]) -> str:
    """Returns a description of a request whose answer is not what it must be, empty if it is."""
    if wish.leave is not None:
        # Who leaves before the best are known gets the best of what there is.
        right = wish.selects or all(found[0][index].begins(whole[0][index]) for index in found[0])
    else:
        right = found == whole
    return "" if right else f"request {wish}\nfound    {found}\nalone    {whole}"


@pytest.mark.invariant(8, 9, 13, 14)
@pytest.mark.parametrize("name", SETTINGS)
async def test_every_request_gives_the_same_alone_and_in_any_company(
    name: str, model: str, alone: list[tuple[Wish, list[Answer]]], tmp_path: Path
) -> None:
    """Otherwise an answer would depend on who else is served: samples, searches, forks, turns, whoever leaves or fails.

    Tokens, texts, endings and log-probabilities are compared bit for bit.
    """
    settings = dict(SETTINGS[name])
    fronts = settings.pop("fronts", False)
    world = TinyWorld(model, settings.pop("blocks"), **settings)
    async with serving(world, SECONDS), contextlib.AsyncExitStack() as stack:
        sessions = SessionService(world.engine, world.config)
        if fronts:
            address = f"unix:{tmp_path / 'engine.sock'}"
            await stack.enter_async_context(engine_host(world, address))
            world.engine, sessions = await stack.enter_async_context(front_of(world, address))
        answers = await asyncio.gather(*(answer(world, sessions, wish) for wish, _ in alone))
        differences = [
            text
            for (wish, whole), (found, _) in zip(alone, answers, strict=True)
            if (text := difference(wish, found, whole))
        ]
        assert not differences, f"{len(differences)} of {COUNT}:\n" + "\n\n".join(differences[:3])
        if not settings.get("forecast"):
            assert sum(count for _, count in answers) > 0, "the pool was meant to be too small"
        assert bool(world.swap_count) == ("swap_space" in SETTINGS[name])
        await world.settle()
