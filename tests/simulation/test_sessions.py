"""Sessions on the whole gateway: what a turn costs, what a branch shares, what an ending leaves."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gateway.plan import sample_seed
from protos.gateway.v1 import gateway_pb2
from protos.gateway.v1 import session_pb2 as pb
from quire.errors import InvalidRequestError, PromptTooLongError, SessionBusyError, SessionNotFoundError
from tests.simulation.oracle_executor import expected_tokens
from tests.simulation.world import World, ids, running

pytestmark = pytest.mark.usefixtures("both_ways")


class Reader:
    """Takes what a turn writes: a context of grpc."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.usage: gateway_pb2.Usage | None = None
        self.started = asyncio.Event()

    async def write(self, response: pb.AppendSessionResponse) -> None:
        """Notes one message."""
        for sample in response.event.delta.samples:
            self.tokens.extend(sample.token_ids)
            self.started.set()
        if response.event.HasField("finished"):
            self.usage = response.event.finished.usage


class Sessions:
    """A service and a session that it keeps."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.service: Any = world.sessions

    async def create(self, name: str = "s", **fields: Any) -> None:
        """Opens a session."""
        await self.service.CreateSession(pb.CreateSessionRequest(session_id=name, **fields), None)

    async def append(
        self, tokens: list[int], name: str = "s", seed: int = 0, count: int = 9, reader: Reader | None = None
    ) -> Reader:
        """Adds a turn of tokens and returns what came of it."""
        reader = reader or Reader()
        turn = gateway_pb2.GenerationSpec(
            sampling=gateway_pb2.Sampling(seed=seed),
            stopping=gateway_pb2.Stopping(max_tokens=count, ignore_eos=True),
        )
        if tokens:
            turn.token_ids.CopyFrom(ids(tokens))
        await self.service.AppendSession(pb.AppendSessionRequest(session_id=name, turn=turn), reader)
        return reader

    async def get(self, name: str = "s") -> pb.Session:
        """Returns a session."""
        return (await self.service.GetSession(pb.GetSessionRequest(session_id=name), None)).session


def kept(said: int) -> int:
    """Returns how many of so many tokens a turn finds.

    The last token of an answer is not computed when that ends: nothing follows it then. And less than a quarter of a
    block is not worth its copy.
    """
    computed = max(0, said - 1)
    return computed - (computed % 16 if computed % 16 < 4 else 0)


async def test_a_conversation_of_twenty_turns_computes_only_what_each_turn_adds() -> None:
    """Otherwise a long conversation costs its square."""
    async with running(World(64)) as world:
        sessions = Sessions(world)
        await sessions.create()
        said: list[int] = []
        for turn in range(20):
            before = world.executor.computed_token_count
            new = [(turn * 31 + place) % 255 + 1 for place in range(11)]
            reader = await sessions.append(new, seed=turn)
            assert reader.tokens == expected_tokens(said + new, turn, 9, ignore_eos=True)
            assert reader.usage is not None
            cached = reader.usage.cached_token_count
            assert cached == kept(len(said))
            assert world.executor.computed_token_count - before == len(said) + len(new) - cached + 8
            said += new + reader.tokens
        assert (await sessions.get()).turn_count == 20
        assert (await sessions.get()).token_count == len(said) == 400
        await world.settle()


@pytest.mark.parametrize("at_token", [None, 0, 1, 33, 48, 60])
async def test_branches_go_on_from_any_token_and_compute_nothing_of_what_they_share(at_token: int | None) -> None:
    """An edit in the middle of a conversation must not cost its beginning, nor change the others."""
    async with running(World(64)) as world:
        sessions = Sessions(world)
        await sessions.create()
        trunk = [place % 255 + 1 for place in range(50)]
        trunk += (await sessions.append(trunk, seed=1, count=10)).tokens
        before = world.executor.computed_token_count
        request = pb.ForkSessionRequest(session_id="s", count=3, at_token=at_token)
        forks = (await sessions.service.ForkSession(request, None)).sessions
        assert world.executor.computed_token_count == before
        shared = 60 if at_token is None else at_token
        assert [fork.token_count for fork in forks] == [shared] * 3

        async def branch(number: int, name: str) -> None:
            reader = await sessions.append([200 + number], name, seed=number)
            assert reader.tokens == expected_tokens([*trunk[:shared], 200 + number], number, 9, ignore_eos=True)
            assert reader.usage is not None
            assert reader.usage.cached_token_count == max(0, min(shared, 59))

        await asyncio.gather(*(branch(number, fork.session_id) for number, fork in enumerate(forks)))
        rest = await sessions.append([7], seed=9)
        assert rest.tokens == expected_tokens([*trunk, 7], 9, 9, ignore_eos=True)
        await world.settle()


async def test_a_turn_that_is_cut_off_leaves_the_session_as_it_was() -> None:
    """Whoever interrupts an answer must be able to say something else instead."""
    async with running(World(64)) as world:
        sessions = Sessions(world)
        await sessions.create()
        said = [1, 2, 3]
        said += (await sessions.append([1, 2, 3])).tokens
        reader = Reader()
        task = asyncio.create_task(sessions.append([5] * 20, count=400, reader=reader))
        await reader.started.wait()
        assert (await sessions.get()).busy
        with pytest.raises(SessionBusyError):
            await sessions.append([6])
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert not (await sessions.get()).busy
        again = await sessions.append([8], seed=4)
        assert again.tokens == expected_tokens([*said, 8], 4, 9, ignore_eos=True)
        assert (await sessions.get()).token_count == len(said) + 10
        more = await sessions.append([], seed=sample_seed(4, 0))
        assert more.tokens == expected_tokens([*said, 8, *again.tokens], 4, 9, ignore_eos=True)
        await world.settle()


async def test_sessions_end_are_listed_in_pages_and_survive_a_lost_executor() -> None:
    """What is kept must be seen, must end, and must not depend on one device."""
    async with running(World(64)) as world:
        sessions = Sessions(world)
        for name in "dbca":
            await sessions.create(name)
        page = await sessions.service.ListSessions(pb.ListSessionsRequest(page_size=3), None)
        assert [session.session_id for session in page.sessions] == ["a", "b", "c"]
        rest = await sessions.service.ListSessions(pb.ListSessionsRequest(page_token=page.next_page_token), None)
        assert [session.session_id for session in rest.sessions] == ["d"]
        assert not rest.next_page_token
        await sessions.service.DeleteSession(pb.DeleteSessionRequest(session_id="a"), None)
        with pytest.raises(SessionNotFoundError):
            await sessions.append([1], "a")
        said = [4, 5, *(await sessions.append([4, 5], "b")).tokens]
        world.executor.fail_at_step = world.executor.step_count + 3
        reader = await sessions.append([6], "b", seed=2, count=30)
        assert reader.tokens == expected_tokens([*said, 6], 2, 30, ignore_eos=True)
        await world.settle()


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("CreateSession", pb.CreateSessionRequest(session_id="a b"), "session_id"),
        ("CreateSession", pb.CreateSessionRequest(ttl={"seconds": 0}), "ttl"),
        ("CreateSession", pb.CreateSessionRequest(ttl={"seconds": 10**6}), "ttl"),
        ("ForkSession", pb.ForkSessionRequest(session_id="s", count=0), "count"),
        ("ForkSession", pb.ForkSessionRequest(session_id="s", count=65), "count"),
        ("ForkSession", pb.ForkSessionRequest(session_id="s", at_token=1), "at_token"),
        ("ListSessions", pb.ListSessionsRequest(page_size=1001), "page_size"),
        ("AppendSession", pb.AppendSessionRequest(session_id="s", turn={"model": "other", "text": "x"}), "turn.model"),
        ("AppendSession", pb.AppendSessionRequest(session_id="s", turn={"sampling": {"n": 2}}), "turn.sampling.n"),
        ("AppendSession", pb.AppendSessionRequest(session_id="s"), "prompt"),
    ],
)
async def test_what_is_wrong_with_a_call_is_named(method: str, request_: Any, field: str) -> None:
    """The user must be able to correct it from the message alone."""
    async with running(World(20)) as world:
        sessions = Sessions(world)
        await sessions.create()
        with pytest.raises(InvalidRequestError) as caught:
            await getattr(sessions.service, method)(request_, Reader())
        assert caught.value.field == field
        assert not (await sessions.get()).busy


async def test_a_turn_that_no_context_could_hold_is_refused_before_it_is_tokenised() -> None:
    """One client with a book must not keep the tokenizer from everybody else's prompts."""
    async with running(World(64)) as world:
        sessions = Sessions(world)
        await sessions.create()
        await sessions.append([3, 4], count=2)
        await sessions.create("chat")
        book = "a" * (256 * world.engine.find_model("").max_model_len + 1)
        chat = gateway_pb2.Chat(messages=[gateway_pb2.ChatMessage(role="user", content=book)])
        for name, field, prompt in (("s", "turn.text", {"text": book}), ("chat", "turn.chat", {"chat": chat})):
            turn = gateway_pb2.GenerationSpec(**prompt)  # type: ignore[arg-type]
            request = pb.AppendSessionRequest(session_id=name, turn=turn)
            with pytest.raises(PromptTooLongError, match=f"{field}: {len(book)} characters"):
                await sessions.service.AppendSession(request, Reader())
            assert not (await sessions.get(name)).busy
