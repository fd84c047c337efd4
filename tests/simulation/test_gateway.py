"""The whole gateway on the real memory core and the oracle executor, under seeded load."""

from __future__ import annotations

import asyncio
import random

import pytest

from gateway.plan import sample_seed
from memsvc.core.invariants import check_pool
from memsvc.core.tenancy import TenantQuota
from protos.gateway.v1 import gateway_pb2 as pb
from quire.errors import AdmissionError, PromptTooLongError
from quire.memory import Admission, AdmitRequest
from tests.simulation.oracle_executor import expected_tokens
from tests.simulation.world import World, ids, running


async def test_a_request_produces_exactly_its_tokens() -> None:
    """The simplest request of all must work, and leave nothing behind."""
    async with running(World(64)) as world:
        prompt = list(range(1, 41))
        stream = await world.submit(
            token_ids=ids(prompt), sampling=pb.Sampling(seed=7), stopping=pb.Stopping(max_tokens=50, ignore_eos=True)
        )
        (tokens,), usage = await world.collect(stream)
        assert tokens == expected_tokens(prompt, 7, 50, ignore_eos=True)
        assert (usage.prompt_token_count, usage.completion_token_count, usage.cached_token_count) == (40, 50, 0)
        assert usage.peak_block_count == 6
        await world.settle()


async def test_a_second_equal_prompt_computes_one_token_of_it() -> None:
    """A prompt that is cached entirely costs one token, not a block."""
    async with running(World(64)) as world:
        prompt = list(range(1, 41))
        for expected_cached in (0, 39):
            before = world.executor.computed_token_count
            stream = await world.submit(
                token_ids=ids(prompt), sampling=pb.Sampling(seed=7), stopping=pb.Stopping(max_tokens=1)
            )
            _, usage = await world.collect(stream)
            await stream.wait_released()
            assert usage.cached_token_count == expected_cached
            assert world.executor.computed_token_count - before == 40 - expected_cached
        await world.settle()


async def test_row_35_of_two_equal_prompts_that_come_at_once_the_second_computes_only_its_rest() -> None:
    """Otherwise everybody who asks the same thing at once pays for it, and holds it, alone."""
    async with running(World(64, budget=16)) as world:
        prompt = list(range(1, 71))
        spec = {"token_ids": ids(prompt), "stopping": pb.Stopping(max_tokens=3, ignore_eos=True)}
        streams = [await world.submit(sampling=pb.Sampling(seed=seed), **spec) for seed in range(4)]
        results = await asyncio.gather(*(world.collect(stream) for stream in streams))
        for seed, ((tokens,), _) in enumerate(results):
            assert tokens == expected_tokens(prompt, seed, 3, ignore_eos=True)
        assert sorted(usage.cached_token_count for _, usage in results)[:2] == [0, 64]
        assert world.executor.computed_token_count <= 70 + 3 * 6 + 4 * 2
        await world.settle()


async def test_row_73_tables_follow_at_the_executor_when_equal_blocks_become_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise equal text that was produced twice is held twice for as long as both go on."""
    monkeypatch.setattr("gateway.core.prefix_wait.PrefixWait.may_wait", lambda *_: False)
    async with running(World(64, budget=64)) as world:
        prompt = list(range(1, 35))
        spec = {"token_ids": ids(prompt), "stopping": pb.Stopping(max_tokens=60, ignore_eos=True)}
        streams = [await world.submit(sampling=pb.Sampling(seed=7), **spec) for _ in range(2)]
        results = [asyncio.create_task(world.collect(stream)) for stream in streams]
        pool = world.memory.core.pool("oracle").memory
        shared = 0
        while not all(result.done() for result in results):
            await asyncio.sleep(0)
            rows = [list(row.blocks) for row in world.executor.rows.values()]
            if len(rows) == 2:
                shared = max(shared, sum(a == b for a, b in zip(*rows, strict=False)))
            check_pool(pool)
        for result in results:
            (tokens,), _ = result.result()
            assert tokens == expected_tokens(prompt, 7, 60, ignore_eos=True)
        assert shared >= 4
        await world.settle()


async def test_samples_share_the_prompt_and_differ_in_their_draws() -> None:
    """N samples must not compute the prompt n times, and each must draw from its own stream."""
    async with running(World(128)) as world:
        prompt = list(range(1, 101))
        stream = await world.submit(
            token_ids=ids(prompt), sampling=pb.Sampling(seed=3, n=4), stopping=pb.Stopping(max_tokens=20)
        )
        tokens, usage = await world.collect(stream)
        for index in range(4):
            assert tokens[index] == expected_tokens(prompt, sample_seed(3, index), 20)
        assert usage.completion_token_count == sum(map(len, tokens))
        # 100 for the first sample and one for each other, plus the completions.
        assert world.executor.computed_token_count <= 100 + 3 + usage.completion_token_count + 8
        await world.settle()


@pytest.mark.invariant(8, 9, 14)
@pytest.mark.parametrize("seed", range(6))
async def test_results_never_depend_on_company(seed: int) -> None:
    """Requests under memory pressure, preemption, shared prefixes and cancellation give what each gives alone."""
    async with running(World(40, seed=seed)) as world:
        chance = random.Random(seed)
        stems = [[chance.randrange(1, 256) for _ in range(chance.randrange(1, 150))] for _ in range(4)]

        async def client(number: int) -> None:
            await asyncio.sleep(chance.random() * 0.05)
            prompt = [*chance.choice(stems), *(chance.randrange(1, 256) for _ in range(chance.randrange(1, 40)))]
            max_tokens = chance.randrange(1, 120)
            samples = chance.choice((1, 1, 1, 2, 3))
            stream = await world.submit(
                token_ids=ids(prompt),
                sampling=pb.Sampling(seed=number, n=samples),
                stopping=pb.Stopping(max_tokens=max_tokens),
            )
            if chance.random() < 0.2:
                await asyncio.sleep(chance.random() * 0.05)
                world.engine.abandon(stream)
                return
            tokens, _ = await world.collect(stream)
            for index in range(samples):
                assert tokens[index] == expected_tokens(prompt, sample_seed(number, index), max_tokens)

        await asyncio.gather(*(client(number) for number in range(40)))
        await world.settle()


@pytest.mark.invariant(13)
@pytest.mark.parametrize("forecast", [False, True])
async def test_memory_pressure_preempts_and_everyone_finishes(*, forecast: bool) -> None:
    """A pool far smaller than the demand must neither hang nor fail anybody; who looks ahead preempts nobody."""
    async with running(World(24, forecast=forecast)) as world:

        async def client(number: int) -> int:
            prompt = [number + 1] * 30
            stream = await world.submit(
                token_ids=ids(prompt),
                sampling=pb.Sampling(seed=number),
                stopping=pb.Stopping(max_tokens=200, ignore_eos=True),
            )
            (tokens,), usage = await world.collect(stream)
            assert tokens == expected_tokens(prompt, number, 200, ignore_eos=True)
            return usage.preemption_count

        preemptions = await asyncio.gather(*(client(number) for number in range(8)))
        assert (sum(preemptions) == 0) == forecast, "the pool was meant to be too small"
        await world.settle()


@pytest.mark.invariant(8, 9, 13, 14)
@pytest.mark.parametrize("seed", range(2))
async def test_priorities_and_shares_change_the_order_and_no_token(seed: int) -> None:
    """Whoever goes first under pressure, everybody gets the answer that it gets alone, and the urgent get it first."""
    async with running(World(30, seed=seed, policy="priority", long_prefill_token_threshold=24)) as world:
        chance = random.Random(seed)
        finished: list[int] = []

        async def client(number: int) -> None:
            priority = chance.randrange(-2, 3)
            prompt = [chance.randrange(1, 256) for _ in range(chance.randrange(1, 120))]
            min_tokens = chance.choice((0, 0, 20))
            stream = await world.submit(
                token_ids=ids(prompt),
                sampling=pb.Sampling(seed=number),
                stopping=pb.Stopping(max_tokens=60, min_tokens=min_tokens),
                scheduling=pb.Scheduling(priority=priority),
            )
            (tokens,), _ = await world.collect(stream)
            assert tokens == expected_tokens(prompt, number, 60, withheld={0}, min_tokens=min_tokens)
            finished.append(priority)

        await asyncio.gather(*(client(number) for number in range(30)))
        await world.settle()
        assert sum(finished[:10]) < sum(finished[-10:])


@pytest.mark.invariant(9, 10)
async def test_an_executor_failure_is_a_pause_not_an_error() -> None:
    """When the session with the executor breaks, requests go on afterwards with the same tokens."""
    async with running(World(64)) as world:
        world.executor.fail_at_step = 12

        async def client(number: int) -> None:
            prompt = [number + 1] * 20
            stream = await world.submit(
                token_ids=ids(prompt),
                sampling=pb.Sampling(seed=number),
                stopping=pb.Stopping(max_tokens=60, ignore_eos=True),
            )
            (tokens,), _ = await world.collect(stream)
            assert tokens == expected_tokens(prompt, number, 60, ignore_eos=True)

        await asyncio.gather(*(client(number) for number in range(6)))
        assert world.executor.step_count > 12
        await world.settle()


@pytest.mark.row(31)
@pytest.mark.parametrize("steps", [3, 9, 25])
@pytest.mark.parametrize("stuck", ["r3", ""])
async def test_row_31_a_forced_reset_queues_what_ran_in_its_order_and_costs_no_token(steps: int, stuck: str) -> None:
    """An operator who clears the cache must not reorder, fail or change what clients wait for."""
    async with running(World(64)) as world:
        admitted: list[str] = []
        admit = world.memory.admit
        stays = {stuck}

        async def note(request: AdmitRequest) -> Admission:
            admission = await admit(request)
            if request.request_id in stays:
                # Its answer is on the way when the reset comes.
                stays.clear()
                await asyncio.Event().wait()
            admitted.append(request.request_id)
            return admission

        world.memory.admit = note  # type: ignore[method-assign]

        async def client(number: int) -> None:
            prompt = [number + 1] * 40
            stream = await world.submit(
                request_id=f"r{number}",
                token_ids=ids(prompt),
                sampling=pb.Sampling(seed=number),
                stopping=pb.Stopping(max_tokens=60, ignore_eos=True),
            )
            (tokens,), _ = await world.collect(stream)
            assert tokens == expected_tokens(prompt, number, 60, ignore_eos=True)

        clients = [asyncio.create_task(client(number)) for number in range(8)]
        while world.executor.step_count < steps:
            await asyncio.sleep(0)
        epoch = world.memory.core.pool("oracle").epoch
        before = len(admitted)
        assert world.memory.reset_cache("oracle", force=True) > 0
        assert world.memory.core.pool("oracle").epoch > epoch
        await asyncio.gather(*clients)
        assert admitted[:before] == [f"r{number}" for number in range(before)]
        assert admitted[before:][:8] == [f"r{number}" for number in range(8)]
        await world.settle()


async def test_a_tenant_at_its_ceiling_waits_and_delays_nobody_else() -> None:
    """A burst of one tenant at the head of the queue must not hold up the others, and must be served in the end."""
    async with running(World(64)) as world:
        world.memory.core.set_quota("oracle", "busy", TenantQuota(ceiling=8))
        ended: list[str] = []

        async def client(number: int, tenant: str) -> None:
            prompt = [number + 1] * 40
            stream = await world.submit(
                tenant=tenant,
                token_ids=ids(prompt),
                sampling=pb.Sampling(seed=number),
                stopping=pb.Stopping(max_tokens=60, ignore_eos=True),
            )
            (tokens,), _ = await world.collect(stream)
            assert tokens == expected_tokens(prompt, number, 60, ignore_eos=True)
            ended.append(tenant)
            core = world.memory.core
            assert core.pool("oracle").memory.tenant_use(core.tenant_tag("oracle", "busy")).held <= 8

        await asyncio.gather(*(client(number, "busy" if number < 5 else "calm") for number in range(8)))
        assert sorted(ended) == ["busy"] * 5 + ["calm"] * 3
        assert ended[-3:] == ["busy"] * 3
        await world.settle()


async def test_cancel_confirms_that_blocks_are_back() -> None:
    """After CancelRequests has answered nothing of the request may be held."""
    async with running(World(64)) as world:
        stream = await world.submit(
            request_id="victim",
            token_ids=ids([5] * 100),
            stopping=pb.Stopping(max_tokens=400, ignore_eos=True),
        )
        reader = asyncio.create_task(world.collect(stream))
        await asyncio.sleep(0.02)
        assert await world.engine.cancel("victim")
        assert world.held() <= 8, "only the growth lease may be left"
        tokens, _ = await reader
        assert len(tokens[0]) < 400
        assert not await world.engine.cancel("victim")
        await world.settle()


@pytest.mark.invariant(12)
async def test_a_full_queue_refuses_with_a_retry_delay() -> None:
    """Overload is a status with a delay, at once; those already queued are not disturbed."""
    async with running(World(24, queue_size=4)) as world:
        streams, refusals = [], []
        for number in range(30):
            try:
                streams.append(
                    await world.submit(
                        token_ids=ids([number + 1] * 300),
                        sampling=pb.Sampling(seed=number),
                        stopping=pb.Stopping(max_tokens=10, ignore_eos=True),
                    )
                )
            except AdmissionError as error:
                refusals.append(error)
        assert refusals
        assert all(error.reason == "QUEUE_FULL" and error.retry_after for error in refusals)
        for stream in streams:
            await world.collect(stream)
        await world.settle()


async def test_a_prompt_larger_than_the_pool_is_refused_with_both_numbers() -> None:
    """What can never run must fail at once and name what it needs and what there is."""
    async with running(World(11)) as world:
        with pytest.raises(PromptTooLongError, match=r"160 tokens, the whole pool holds 160"):
            await world.submit(token_ids=ids([1] * 160))


async def test_a_request_that_waits_too_long_is_refused() -> None:
    """max_queue_time ends a wait with RESOURCE_EXHAUSTED instead of silence."""
    async with running(World(24)) as world:
        first = await world.submit(
            token_ids=ids([1] * 340),
            sampling=pb.Sampling(seed=1),
            stopping=pb.Stopping(max_tokens=20, ignore_eos=True),
        )
        spec: dict[str, object] = {"token_ids": ids([2] * 340), "stopping": pb.Stopping(max_tokens=20)}
        scheduling = pb.Scheduling()
        scheduling.max_queue_time.FromMilliseconds(1)
        second = await world.submit(scheduling=scheduling, **spec)
        await asyncio.sleep(0)
        results = await asyncio.gather(world.collect(first), world.collect(second), return_exceptions=True)
        assert not isinstance(results[0], BaseException)
        assert isinstance(results[1], AdmissionError)
        assert results[1].reason == "QUEUE_TIMEOUT"
        await world.settle()


@pytest.mark.row(43, 54, 55)
@pytest.mark.parametrize("seed", range(3))
async def test_a_sliding_window_bounds_what_each_sequence_holds(seed: int) -> None:
    """A model that forgets must not hold what it forgot, and must never read what was given to another sequence."""
    window = 40
    async with running(World(25, seed=seed, window=window)) as world:
        head = [world.random.randrange(1, 256) for _ in range(100)]
        jobs = []
        for index in range(12):
            prompt = head[: world.random.choice((30, 100))] + [index] * world.random.randrange(1, 260)
            count = world.random.randrange(1, 60)
            stream = await world.submit(
                token_ids=ids(prompt),
                sampling=pb.Sampling(seed=index),
                stopping=pb.Stopping(max_tokens=count, ignore_eos=True),
            )
            jobs.append((stream, expected_tokens(prompt, index, count, ignore_eos=True)))
        results = await asyncio.gather(*(world.collect(stream) for stream, _ in jobs))
        for ((tokens,), usage), (_, expected) in zip(results, jobs, strict=True):
            assert tokens == expected
            # The window, a chunk of 64 tokens on either of the two steps in flight, and the block that is written.
            assert usage.peak_block_count <= 4 + 2 * 5
        await world.settle()


@pytest.mark.row(43)
async def test_a_prompt_longer_than_the_pool_runs_where_its_window_fits() -> None:
    """Otherwise the longest prompt of a model that forgets is limited by memory that it does not need."""
    async with running(World(6, window=40)) as world:
        prompt = list(range(1, 201)) + [3] * 200
        stream = await world.submit(
            token_ids=ids(prompt), sampling=pb.Sampling(seed=1), stopping=pb.Stopping(max_tokens=50, ignore_eos=True)
        )
        (tokens,), usage = await world.collect(stream)
        assert tokens == expected_tokens(prompt, 1, 50, ignore_eos=True)
        assert usage.peak_block_count <= 5
        await world.settle()
