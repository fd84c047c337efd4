"""Several samples of one prompt: computed once, shared until they part, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import random

import pytest

from gateway.plan import sample_seed
from protos.gateway.v1 import gateway_pb2 as pb
from quire.errors import TenantCeilingError
from quire.memory import Fork, ForkRequest
from tests.simulation.oracle_executor import expected_tokens
from tests.simulation.world import World, ids, running

pytestmark = pytest.mark.usefixtures("both_ways")

PROMPT = [number % 251 + 1 for number in range(1000)]


async def test_eight_samples_compute_the_prompt_once_and_share_its_blocks_until_they_part() -> None:
    """Otherwise n samples cost n prompts, or n times the memory of one."""
    async with running(World(200, budget=256, context=2048)) as world:
        pool = world.memory.core.pool("oracle").memory
        fork = world.memory.fork
        shared: list[list[int]] = []

        async def note(request: ForkRequest) -> Fork:
            answer = await fork(request)
            shared.append([int(pool.pool.refs[block]) for block in answer.block_ids])
            assert world.executor.computed_token_count == 1000
            return answer

        world.memory.fork = note  # type: ignore[method-assign]
        stream = await world.submit(
            token_ids=ids(PROMPT),
            sampling=pb.Sampling(seed=3, n=8),
            stopping=pb.Stopping(max_tokens=40, ignore_eos=True),
        )
        tokens, usage = await world.collect(stream)
        assert shared == [[8] * 63]
        for index in range(8):
            assert tokens[index] == expected_tokens(PROMPT, sample_seed(3, index), 40, ignore_eos=True)
        # The last token of each sample is not computed: nothing follows it.
        assert world.executor.computed_token_count == 1000 + 8 * 39
        assert world.executor.copied_block_count == 7
        assert usage.completion_token_count == 8 * 40
        await world.settle()


@pytest.mark.parametrize("prompt_length", [1, 15, 16, 17])
@pytest.mark.parametrize("max_tokens", [1, 18])
async def test_samples_part_at_every_place_in_a_block(prompt_length: int, max_tokens: int) -> None:
    """A copy that is left out, made late or made for nothing shows as a foreign token or a leak."""
    async with running(World(40)) as world:
        prompt = PROMPT[:prompt_length]
        stream = await world.submit(
            token_ids=ids(prompt), sampling=pb.Sampling(seed=5, n=3), stopping=pb.Stopping(max_tokens=max_tokens)
        )
        tokens, _ = await world.collect(stream)
        for index in range(3):
            assert tokens[index] == expected_tokens(prompt, sample_seed(5, index), max_tokens)
        await world.settle()
        assert world.executor.computed_token_count >= prompt_length
        if max_tokens == 1:
            assert world.executor.computed_token_count == prompt_length


async def test_more_samples_than_may_run_at_once_all_end() -> None:
    """A request with more samples than the server has places must be served, not fail or hang."""
    async with running(World(120)) as world:
        spec = {"token_ids": ids(PROMPT[:40]), "stopping": pb.Stopping(max_tokens=12, ignore_eos=True)}
        streams = [await world.submit(sampling=pb.Sampling(seed=seed, n=64), **spec) for seed in range(2)]
        for seed, stream in enumerate(streams):
            tokens, _ = await world.collect(stream)
            for index in range(64):
                seed_of = sample_seed(seed, index)
                assert tokens[index] == expected_tokens(PROMPT[:40], seed_of, 12, ignore_eos=True)
        await world.settle()


async def test_samples_whose_fork_is_refused_are_queued() -> None:
    """A tenant at its ceiling gets its samples later, not an error."""
    async with running(World(64)) as world:
        refused = 0

        async def refuse(request: ForkRequest) -> Fork:
            nonlocal refused
            refused += 1
            raise TenantCeilingError("the tenant holds all it may")

        world.memory.fork = refuse  # type: ignore[method-assign]
        stream = await world.submit(
            token_ids=ids(PROMPT[:40]), sampling=pb.Sampling(seed=1, n=4), stopping=pb.Stopping(max_tokens=30)
        )
        tokens, _ = await world.collect(stream)
        for index in range(4):
            assert tokens[index] == expected_tokens(PROMPT[:40], sample_seed(1, index), 30)
        assert refused == 1
        await world.settle()


@pytest.mark.invariant(8, 9, 10, 14)
@pytest.mark.parametrize("fail_at_step", [2, 3, 4, 5, 7, 12])
async def test_samples_survive_a_lost_executor_at_any_step(fail_at_step: int) -> None:
    """When the session breaks before, while or after tables are forked, every sample goes on and nothing leaks."""
    async with running(World(64)) as world:
        world.executor.fail_at_step = fail_at_step

        async def client(number: int) -> None:
            prompt = PROMPT[number : number + 45]
            stream = await world.submit(
                token_ids=ids(prompt),
                sampling=pb.Sampling(seed=number, n=4),
                stopping=pb.Stopping(max_tokens=20, ignore_eos=True),
            )
            tokens, _ = await world.collect(stream)
            for index in range(4):
                assert tokens[index] == expected_tokens(prompt, sample_seed(number, index), 20, ignore_eos=True)

        await asyncio.gather(*(client(number) for number in range(3)))
        assert world.executor.step_count > fail_at_step
        await world.settle()


@pytest.mark.invariant(8, 9, 13, 14)
@pytest.mark.parametrize("seed", range(3))
async def test_samples_under_memory_pressure_preemption_and_cancellation_give_what_they_give_alone(seed: int) -> None:
    """Whoever is preempted, cancelled or forked beside a request, its samples are the same, and nothing is left."""
    async with running(World(36, seed=seed)) as world:
        chance = random.Random(seed)

        async def client(number: int) -> int:
            await asyncio.sleep(chance.random() * 0.05)
            start = chance.randrange(0, 900)
            prompt = PROMPT[start : start + chance.randrange(1, 90)]
            count, max_tokens = chance.randrange(2, 9), chance.randrange(1, 90)
            stream = await world.submit(
                request_id=f"r{number}",
                token_ids=ids(prompt),
                sampling=pb.Sampling(seed=number, n=count),
                stopping=pb.Stopping(max_tokens=max_tokens),
            )
            leaves = chance.random()
            if leaves < 0.3:
                await asyncio.sleep(chance.random() * 0.04)
                if leaves < 0.15:
                    world.engine.abandon(stream)
                else:
                    await world.engine.cancel(f"r{number}")
                return 0
            tokens, usage = await world.collect(stream)
            for index in range(count):
                assert tokens[index] == expected_tokens(prompt, sample_seed(number, index), max_tokens)
            return usage.preemption_count

        preemptions = await asyncio.gather(*(client(number) for number in range(24)))
        assert sum(preemptions) > 0, "the pool was meant to be too small"
        await world.settle()
