"""Preempted sequences go to host memory and come back: the whole gateway on the oracle executor, which keeps slots."""

from __future__ import annotations

import asyncio
import random

import pytest

from protos.gateway.v1 import gateway_pb2 as pb
from tests.simulation.oracle_executor import expected_tokens
from tests.simulation.world import World, ids, running

ENDLESS = {"ignore_eos": True}


async def crowd(world: World, count: int, max_tokens: int = 150) -> list[pb.Usage]:
    """Runs `count` requests at once, checks what each produces, and returns what they cost."""
    chance = random.Random(7)
    prompts = [[chance.randrange(1, 256) for _ in range(chance.randrange(1, 120))] for _ in range(count)]

    async def client(number: int) -> pb.Usage:
        stream = await world.submit(
            token_ids=ids(prompts[number]),
            sampling=pb.Sampling(seed=number),
            stopping=pb.Stopping(max_tokens=max_tokens, **ENDLESS),
        )
        (tokens,), usage = await world.collect(stream)
        assert tokens == expected_tokens(prompts[number], number, max_tokens, ignore_eos=True)
        return usage

    return await asyncio.gather(*(client(number) for number in range(count)))


def total(usages: list[pb.Usage], name: str) -> int:
    """Returns the sum of one figure."""
    return sum(getattr(usage, name) for usage in usages)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mode", ["swap", "auto"])
async def test_who_was_swapped_out_goes_on_with_nothing_computed_twice(mode: str, seed: int) -> None:
    """That is what host memory is set aside for; a slot or a block mixed up would be a wrong token."""
    async with running(World(40, seed=seed, swap_slots=100, preemption_mode=mode)) as world:
        usages = await crowd(world, 10)
        await world.settle()
        assert total(usages, "preemption_count") == total(usages, "swap_count") > 0
        assert total(usages, "recomputed_token_count") == 0
        executor = world.executor
        assert total(usages, "swapped_block_count") == executor.swapped_out_count + executor.swapped_in_count
        # What the prefix cache still holds is not moved back.
        assert 0 < executor.swapped_in_count <= executor.swapped_out_count
        statistics = world.memory.core.pool("oracle").memory.statistics
        assert statistics.swap_count == statistics.preemption_count == total(usages, "swap_count")


async def test_without_host_memory_and_by_choice_everything_is_computed_again() -> None:
    """Whoever sets no memory aside, or forbids it, must not find blocks on the way."""
    for slots, mode in ((0, "swap"), (100, "recompute")):
        async with running(World(40, swap_slots=slots, preemption_mode=mode)) as world:
            usages = await crowd(world, 10)
            await world.settle()
            assert total(usages, "swap_count") == 0 < total(usages, "recomputed_token_count")
            assert not world.executor.swapped_out_count


async def test_a_transfer_that_costs_more_than_computing_is_not_made() -> None:
    """A slow link to host memory would make preemption dearer than it was without."""
    async with running(World(40, swap_slots=100)) as world:
        lane = world.engine._lanes["oracle"]
        assert lane.scheduler is not None
        # A block is 1,024 bytes and 16 tokens, each a microsecond: half a microsecond for 16 bytes, twice.
        lane.scheduler.swapping._settings = type(lane.scheduler.swapping._settings)(100, 3e7, 3e7)
        usages = await crowd(world, 10)
        await world.settle()
        assert total(usages, "preemption_count") > 0 == total(usages, "swap_count")


@pytest.mark.parametrize("seed", range(3))
async def test_slots_that_others_took_meanwhile_cost_a_computation_and_nothing_else(seed: int) -> None:
    """Gateways on one executor do not know what the others are about to take."""
    async with running(World(40, seed=seed, swap_slots=24, preemption_mode="swap")) as world:
        chance = random.Random(seed)
        world.executor.elsewhere = lambda: chance.choice((0, 0, 12, 24))
        usages = await crowd(world, 12)
        await world.settle()
        assert world.executor.refused_count > 0
        assert total(usages, "swap_count") > 0


@pytest.mark.parametrize("fail_at", range(20, 200, 12))
async def test_a_lost_executor_loses_its_slots_and_no_token(fail_at: int) -> None:
    """What was in host memory is gone with it: whoever counted on it must compute again, not read another's."""
    async with running(World(40, seed=fail_at, swap_slots=100, preemption_mode="swap")) as world:
        world.executor.fail_at_step = fail_at
        await crowd(world, 10)
        await world.settle()


@pytest.mark.parametrize("seed", range(3))
async def test_cancels_at_any_moment_give_slots_back(seed: int) -> None:
    """A slot that is held for somebody who will never come back is lost until the executor restarts."""
    async with running(World(30, seed=seed, queue_size=1000, swap_slots=60, preemption_mode="swap")) as world:
        chance = random.Random(seed)

        async def steps(count: int, reading: asyncio.Task[object] | None = None) -> None:
            last = world.executor.step_count + count
            while world.executor.step_count < last and not (reading and reading.done()):
                await asyncio.sleep(0.0005)

        async def client(number: int) -> None:
            if number >= 8:
                await steps(chance.randrange(100))
            stream = await world.submit(
                request_id=f"c{number}",
                token_ids=ids([chance.choice((1, 2, 3))] * chance.randrange(1, 150)),
                sampling=pb.Sampling(seed=number, n=chance.choice((1, 1, 2))),
                stopping=pb.Stopping(max_tokens=200, **ENDLESS),
            )
            reading = asyncio.create_task(world.collect(stream))
            await steps(chance.randrange(400), reading)
            if chance.random() < 0.5:
                assert await world.engine.cancel(f"c{number}") or reading.done()
                await reading
            else:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)
                world.engine.abandon(stream)

        await asyncio.gather(*(client(number) for number in range(60)))
        await world.settle()
        assert world.executor.swapped_out_count > 0
        scheduler = world.engine._lanes["oracle"].scheduler
        assert scheduler is not None
        assert scheduler.swapping.held_count == 0


@pytest.mark.parametrize("seed", range(3))
async def test_samples_that_share_their_prompt_move_it_once(seed: int) -> None:
    """The blocks of a shared prompt stay while one that names them runs; the last one takes them along for all."""
    async with running(World(30, seed=seed, swap_slots=200, preemption_mode="swap")) as world:
        prompts = [[number + 1] * 40 + list(range(1, 60)) for number in range(3)]

        async def client(number: int) -> pb.Usage:
            stream = await world.submit(
                token_ids=ids(prompts[number]),
                sampling=pb.Sampling(seed=100 * number, n=4),
                stopping=pb.Stopping(max_tokens=80, **ENDLESS),
            )
            samples, usage = await world.collect(stream)
            assert len({tuple(sample) for sample in samples}) == 4
            assert samples[0] == expected_tokens(prompts[number], 100 * number, 80, ignore_eos=True)
            return usage

        usages = await asyncio.gather(*(client(number) for number in range(3)))
        await world.settle()
        assert total(usages, "swap_count") > 0
        assert total(usages, "recomputed_token_count") == 0


async def test_a_beam_search_is_the_same_with_and_without_swap() -> None:
    """Beams are forked after every token, held in between, and dropped at any time: their slots, too."""
    found = []
    for mode in ("recompute", "swap"):
        async with running(World(24, swap_slots=200, preemption_mode=mode)) as world:
            streams = [
                await world.submit(
                    token_ids=ids([number + 1] * 50),
                    sampling=pb.Sampling(beam_width=3),
                    stopping=pb.Stopping(max_tokens=40, **ENDLESS),
                )
                for number in range(3)
            ]
            results = await asyncio.gather(*(world.collect(stream) for stream in streams))
            await world.settle()
            found.append([tokens for tokens, _ in results])
            assert total([usage for _, usage in results], "preemption_count") > 0
    assert found[0] == found[1]
