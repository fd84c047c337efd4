"""Several fronts before one engine: what each has, what they share, and what is left of one that is gone."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from gateway.fronts import engine_service, remote_engine
from gateway.fronts.remote_engine import RemoteEngine
from gateway.fronts.requests import to_submit
from gateway.streams import RequestStream
from gateway.validation import check_spec
from protos.gateway.v1 import engine_pb2, engine_pb2_grpc, session_pb2
from protos.gateway.v1 import gateway_pb2 as pb
from quire.errors import AdmissionError, NotReadyError, RequestExistsError, SessionBusyError
from quire.rpc import open_private_channel
from tests.simulation.oracle_executor import expected_tokens
from tests.simulation.test_sessions import Sessions
from tests.simulation.world import World, engine_host, front_of, ids, running

PROMPT = list(range(1, 41))


@pytest.fixture(autouse=True)
def _with_front(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "with_front", True)


async def submit(world: World, engine: RemoteEngine, seed: int, count: int = 200, **fields: Any) -> RequestStream:
    """Has a front send a request."""
    spec = pb.GenerationSpec(
        token_ids=ids(PROMPT),
        sampling=pb.Sampling(seed=seed),
        stopping=pb.Stopping(max_tokens=count, ignore_eos=True),
        **fields,
    )
    model = engine.find_model("")
    return engine.submit(await check_spec(spec, model, max_tokens_default=64, max_queue_time=50.0, caching=True))


async def first_token(stream: RequestStream) -> list[int]:
    """Waits until a stream has tokens and returns them."""
    async for event in stream.events():
        if event.delta.samples:
            return list(event.delta.samples[0].token_ids)
    pytest.fail("the stream ended without a token")


async def until(condition: Any) -> None:
    """Waits until something holds."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_two_fronts_have_one_batch() -> None:
    """With a scheduler for each the steps of an executor would be half as full, and take as long."""
    async with running(World(64)) as world, front_of(world, world.address) as (other, _):
        streams = [await submit(world, engine, seed) for seed in range(4) for engine in (world.engine, other)]
        results = await asyncio.gather(*(world.collect(stream) for stream in streams))
        for number, ((tokens,), _) in enumerate(results):
            assert tokens == expected_tokens(PROMPT, number // 2, 200, ignore_eos=True)
        # 8 sequences of 200 tokens one after the other, or in two batches, would be more.
        assert world.executor.step_count < 300
        await world.settle()


async def test_a_front_that_is_gone_leaves_nothing_and_the_others_go_on() -> None:
    """One process of many must not take the memory of its clients with it, nor the streams of the others."""
    async with running(World(64)) as world:
        async with front_of(world, world.address) as (doomed, sessions):
            await sessions.CreateSession(session_pb2.CreateSessionRequest(session_id="s"), None)
            staying = await submit(world, world.engine, 1)
            leaving = await submit(world, doomed, 2)
            begun = await first_token(leaving)
            await doomed.begin("s")
            with pytest.raises(SessionBusyError):
                await world.engine.begin("s")
            # As the system does it for a process that is killed: the connection is gone, and nobody said a word.
            await doomed._channel.close()
            await until(lambda: len(world.core._live) == 1)
        (tokens,), _ = await world.collect(staying)
        assert tokens == expected_tokens(PROMPT, 1, 200, ignore_eos=True)
        assert begun == expected_tokens(PROMPT, 2, 200, ignore_eos=True)[: len(begun)]
        await world.engine.end(await world.engine.begin("s"))
        await world.settle()


async def test_a_front_that_neither_reads_nor_speaks_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is stopped keeps its connections: without a limit its requests would be served for ever."""
    monkeypatch.setattr(engine_service, "SILENCE_SECONDS", 1.0)
    monkeypatch.setattr(remote_engine, "HEARTBEAT_SECONDS", 0.05)
    async with running(World(20, queue_size=4)) as world, open_private_channel(world.address) as channel:
        call = engine_pb2_grpc.EngineServiceStub(channel).Attach()
        spec = pb.GenerationSpec(
            token_ids=ids(PROMPT), sampling=pb.Sampling(seed=3), stopping=pb.Stopping(max_tokens=200, ignore_eos=True)
        )
        model = world.engine.find_model("")
        for number in range(1, 5):
            settings = await check_spec(spec, model, max_tokens_default=64, max_queue_time=50.0, caching=True)
            calls = [engine_pb2.FrontCall(submit=to_submit(number, settings))]
            await call.write(engine_pb2.AttachRequest(calls=calls))
        await until(lambda: len(world.core._live) >= 4)
        (tokens,), _ = await world.collect(await submit(world, world.engine, 1))
        assert tokens == expected_tokens(PROMPT, 1, 200, ignore_eos=True)
        await until(lambda: not world.core._live)
        await world.settle()


async def test_an_engine_that_is_gone_is_an_error_with_a_delay_and_its_successor_is_found() -> None:
    """Clients try again when they are told when; a front that gave up would be one process less for good."""
    async with running(World(64)) as world:
        stream = await submit(world, world.engine, 1)
        await first_token(stream)
        turn = await begun_turn(world)
        await world.stop_engine_host()
        with pytest.raises(NotReadyError, match="engine is not connected") as caught:
            await world.collect(stream)
        assert (caught.value.reason, caught.value.retry_after) == ("ENGINE_UNAVAILABLE", 1.0)
        await until(lambda: not world.core._live)
        for call in (world.engine.cancel("x"), world.engine.begin("s"), world.engine.keep(turn)):
            with pytest.raises(NotReadyError, match="engine is not connected"):
                await call
        with pytest.raises(NotReadyError, match="engine is not connected"):
            world.engine.find_model("")
        async with engine_host(world, world.address):
            await until(lambda: world.engine._attached)
            (tokens,), _ = await world.collect(await submit(world, world.engine, 2))
            assert tokens == expected_tokens(PROMPT, 2, 200, ignore_eos=True)
            await world.settle()


async def begun_turn(world: World) -> Any:
    """Begins a turn of a new session."""
    await world.sessions.CreateSession(session_pb2.CreateSessionRequest(session_id="s"), None)
    return await world.engine.begin("s")


async def test_an_engine_that_is_silent_counts_as_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that hangs keeps its connections: its clients would wait until their deadlines, if they have any."""
    monkeypatch.setattr(remote_engine, "SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(engine_service, "HEARTBEAT_SECONDS", 1.0)
    async with running(World(64)) as world:
        await until(lambda: not world.engine._attached)
        with pytest.raises(NotReadyError, match="engine is not connected"):
            world.engine.find_model("")


async def test_a_request_is_cancelled_through_any_front_and_its_name_is_one_for_all() -> None:
    """A client's next connection may lead to another process: what it asks there must mean the same."""
    async with running(World(64)) as world, front_of(world, world.address) as (other, _):
        stream = await submit(world, world.engine, 1, 400, request_id="mine")
        await first_token(stream)
        with pytest.raises(RequestExistsError):
            await world.collect(await submit(world, other, 2, request_id="mine"))
        assert await other.cancel("mine")
        reasons = [
            sample.ending.reason
            async for event in stream.events()
            for sample in event.delta.samples
            if sample.HasField("ending")
        ]
        assert reasons == [pb.FINISH_REASON_CANCELLED]
        assert not await other.cancel("mine")
        await world.settle()


async def test_the_turns_of_a_session_may_come_through_different_fronts() -> None:
    """A conversation outlives a connection."""
    async with running(World(64)) as world, front_of(world, world.address) as (_, others):
        here = Sessions(world)
        there = Sessions(world)
        there.service = others
        await here.create()
        said: list[int] = []
        for turn in range(6):
            new = [(turn * 31 + place) % 255 + 1 for place in range(11)]
            reader = await (here, there)[turn % 2].append(new, seed=turn)
            assert reader.tokens == expected_tokens(said + new, turn, 9, ignore_eos=True)
            assert reader.usage is not None
            assert reader.usage.cached_token_count > len(said) - 8
            said += new + reader.tokens
        assert (await there.get()).turn_count == 6
        await world.settle()


async def test_a_turn_whose_client_leaves_before_it_has_begun_does_not_keep_its_session_busy() -> None:
    """Nobody would know of that turn, and nobody would end it."""
    async with running(World(64)) as world:
        await world.sessions.CreateSession(session_pb2.CreateSessionRequest(session_id="s"), None)
        for pause in (0.0, 0.001, 0.002):
            beginning = asyncio.create_task(world.engine.begin("s"))
            await asyncio.sleep(pause)
            beginning.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await world.engine.end(await beginning)
        await world.engine.end(await world.engine.begin("s"))
        await world.settle()


async def test_a_full_queue_is_known_at_every_front_and_so_is_its_room() -> None:
    """A flood must not cost a tokenisation for each refusal, and must be over when it is over."""
    async with running(World(24, queue_size=2)) as world, front_of(world, world.address) as (other, _):
        streams = [await submit(world, world.engine, seed, 300) for seed in range(8)]
        results = await asyncio.gather(*(world.collect(stream) for stream in streams), return_exceptions=True)
        refused = [result for result in results if isinstance(result, AdmissionError)]
        assert refused
        assert all(error.retry_after for error in refused)
        (tokens,), _ = await world.collect(await submit(world, other, 9))
        assert tokens == expected_tokens(PROMPT, 9, 200, ignore_eos=True)
        await world.settle()
