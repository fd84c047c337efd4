"""What clients do to a stream, and what a request is told that it cost: the whole gateway on the oracle executor."""

from __future__ import annotations

import asyncio
import random

import pytest

from protos.gateway.v1 import gateway_pb2 as pb
from quire.errors import InvalidRequestError
from tests.simulation.oracle_executor import expected_tokens
from tests.simulation.world import World, ids, running

pytestmark = pytest.mark.usefixtures("both_ways")


def limited(seconds: float) -> pb.Scheduling:
    """Returns a time limit."""
    scheduling = pb.Scheduling()
    scheduling.time_limit.FromNanoseconds(int(seconds * 1e9))
    return scheduling


async def test_a_time_limit_ends_a_request_with_what_it_has() -> None:
    """Whoever must answer in time gets an error instead of half an answer, or a bill for the rest."""
    async with running(World(64)) as world:
        stream = await world.submit(
            token_ids=ids([1] * 20),
            sampling=pb.Sampling(seed=5),
            stopping=pb.Stopping(max_tokens=480, ignore_eos=True),
            scheduling=limited(0.05),
        )
        tokens: list[int] = []
        reasons = []
        async for event in stream.events():
            for sample in event.delta.samples:
                tokens += sample.token_ids
                if sample.HasField("ending"):
                    reasons.append(sample.ending.reason)
        assert reasons == [pb.FINISH_REASON_TIME_LIMIT]
        assert len(tokens) < 480
        assert tokens == expected_tokens([1] * 20, 5, 480, ignore_eos=True)[: len(tokens)]
        await world.settle()


async def test_a_time_limit_that_passes_in_the_queue_ends_the_request_with_nothing() -> None:
    """A request that waits must not outlive its limit because it never ran."""
    async with running(World(24)) as world:
        options = {"stopping": pb.Stopping(max_tokens=20, ignore_eos=True), "sampling": pb.Sampling(seed=1)}
        first = await world.submit(token_ids=ids([1] * 340), **options)
        second = await world.submit(token_ids=ids([2] * 340), scheduling=limited(1e-6), **options)
        (tokens,), usage = await world.collect(second)
        assert (tokens, usage.completion_token_count, usage.block_seconds) == ([], 0, 0.0)
        await world.collect(first)
        await world.settle()


async def test_a_time_limit_of_nothing_is_refused() -> None:
    """Zero would otherwise mean none, which is the opposite of what it says."""
    async with running(World(24)) as world:
        with pytest.raises(InvalidRequestError, match=r"scheduling.time_limit: found 0.0 s, allowed is more than 0"):
            await world.submit(token_ids=ids([1]), scheduling=pb.Scheduling(time_limit={}))


async def test_usage_says_what_was_stored_and_shared_and_how_long_blocks_were_held() -> None:
    """Whoever pays for memory needs to know what it was: read, written, and held for how long."""
    async with running(World(64)) as world:
        spec = {"token_ids": ids(list(range(1, 41))), "stopping": pb.Stopping(max_tokens=50, ignore_eos=True)}
        _, first = await world.collect(await world.submit(sampling=pb.Sampling(seed=7), **spec))
        # Of 40 + 50 tokens the last is never computed: 89 fill 5 blocks.
        assert (first.cached_token_count, first.shared_block_count, first.stored_token_count) == (0, 0, 80)
        assert 0 < first.block_seconds <= first.peak_block_count * first.total_time.ToNanoseconds() / 1e9
        _, again = await world.collect(await world.submit(sampling=pb.Sampling(seed=8), **spec))
        assert (again.cached_token_count, again.shared_block_count, again.stored_token_count) == (39, 2, 48)
        _, secret = await world.collect(await world.submit(caching=pb.Caching(skip_write=True, salt="x"), **spec))
        assert (secret.shared_block_count, secret.stored_token_count) == (0, 0)
        await world.settle()


async def test_a_client_that_never_reads_holds_no_block() -> None:
    """One frozen client in a pool for few must not keep the others waiting, nor lose what it did not read yet."""
    async with running(World(14)) as world:
        frozen = await world.submit(
            token_ids=ids([1] * 100),
            sampling=pb.Sampling(seed=1),
            stopping=pb.Stopping(max_tokens=100, ignore_eos=True),
        )
        for number in range(2, 5):
            stream = await world.submit(
                token_ids=ids([number] * 100),
                sampling=pb.Sampling(seed=number),
                stopping=pb.Stopping(max_tokens=100, ignore_eos=True),
            )
            (tokens,), _ = await world.collect(stream)
            assert tokens == expected_tokens([number] * 100, number, 100, ignore_eos=True)
        await world.settle()
        messages = [event async for event in frozen.events()]
        assert [message.WhichOneof("event") for message in messages] == ["admitted", "delta", "finished"]
        read = list(messages[1].delta.samples[0].token_ids)
        assert read == expected_tokens([1] * 100, 1, 100, ignore_eos=True)


@pytest.mark.parametrize("seed", range(2))
async def test_cancels_at_any_moment_leave_nothing(seed: int) -> None:
    """A handler, a sequence or a block that a cancel leaves behind is lost for good, one client after the other."""
    async with running(World(40, seed=seed, queue_size=1000)) as world:
        chance = random.Random(seed)
        before = len(asyncio.all_tasks())

        async def client(number: int) -> None:
            await asyncio.sleep(chance.random() * 0.1)
            prompt = [chance.choice((1, 2, 3))] * chance.randrange(1, 150)
            stream = await world.submit(
                request_id=f"c{number}",
                token_ids=ids(prompt),
                sampling=pb.Sampling(seed=number, n=chance.choice((1, 1, 2))),
                stopping=pb.Stopping(max_tokens=200, ignore_eos=True),
            )
            reading = asyncio.create_task(world.collect(stream))
            await asyncio.sleep(chance.random() * 0.1)
            if chance.random() < 0.5:
                assert await world.engine.cancel(f"c{number}") or reading.done()
                await reading
            else:
                reading.cancel()
                world.engine.abandon(stream)

        await asyncio.gather(*(client(number) for number in range(250)))
        await world.settle()
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) <= before
        assert not world.core._live
        assert not world.engine._live


async def test_usage_says_how_many_tokens_were_computed_twice() -> None:
    """Preemptions are told as a count, which says nothing of their price."""
    async with running(World(24)) as world:
        streams = [
            await world.submit(
                token_ids=ids([number + 1] * 30),
                sampling=pb.Sampling(seed=number),
                stopping=pb.Stopping(max_tokens=200, ignore_eos=True),
            )
            for number in range(8)
        ]
        usages = [usage for _, usage in await asyncio.gather(*(world.collect(stream) for stream in streams))]
        twice = sum(usage.recomputed_token_count for usage in usages)
        assert twice > 0
        assert all(usage.preemption_count for usage in usages if usage.recomputed_token_count)
        # A step that is under way when its sequence ends computes one token for nothing.
        once = sum(30 + 200 - 1 - usage.cached_token_count for usage in usages)
        assert once + twice <= world.executor.computed_token_count <= once + twice + 2 * len(usages)
        await world.settle()


async def test_no_tenant_cancels_the_requests_of_another() -> None:
    """Whoever guesses the name of a stranger's request could otherwise end it."""
    async with running(World(64, tenant_metadata="x-tenant")) as world:
        spec = {"token_ids": ids([1] * 20), "stopping": pb.Stopping(max_tokens=200, ignore_eos=True)}
        stream = await world.submit(tenant="acme", request_id="mine", sampling=pb.Sampling(seed=3), **spec)
        assert not await world.engine.cancel("mine", "other")
        # Where tenants are named, a front lets no call without a name get this far.
        assert world.with_front or not await world.engine.cancel("mine")
        (tokens,), _ = await world.collect(stream)
        assert tokens == expected_tokens([1] * 20, 3, 200, ignore_eos=True)
        stream = await world.submit(tenant="acme", request_id="next", sampling=pb.Sampling(seed=3), **spec)
        assert await world.engine.cancel("next", "acme")
        await world.settle()
