"""Random requests of every kind, from a seeded generator, and what is answered to one."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
from typing import Any

from gateway.session_service import SessionService
from gateway.streams import RequestStream
from gateway.validation import check_for
from protos.gateway.v1 import gateway_pb2 as pb
from protos.gateway.v1 import session_pb2
from tests.simulation.tiny_world import TinyWorld

_SCHEMAS = (
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False},
    {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 1, "maxItems": 5},
)
_GRAMMAR = 'start: "(" item+ ")"\nitem: /[a-z]{2}/ | start'
_SEARCHES, _CONVERSATIONS = 0.12, 0.22
"""Up to this share of the requests is of this kind; the others are samples."""
_BEAM_TOKENS, _TURN_TOKENS, _MOST_TOKENS = 24, 21, 60
_STEMS = [[(37 * stem + 11 * place * place) % 250 for place in range(97)] for stem in range(4)]

Logprob = tuple[int, float, int, tuple[tuple[int, float], ...]]


@dataclasses.dataclass(frozen=True, slots=True)
class Said:
    """What was answered of one sample."""

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    ending: bytes = b""
    """pb.Ending, serialised; empty while there is none."""

    def begins(self, whole: Said) -> bool:
        """Whether this may be what a client saw of `whole` that did not stay to the end."""
        return (
            whole.text.startswith(self.text)
            and whole.tokens[: len(self.tokens)] == self.tokens
            and whole.logprobs[: len(self.logprobs)] == self.logprobs
        )


Answer = dict[int, Said]
"""By sample; the log-probabilities of the prompt are those of sample -1."""


@dataclasses.dataclass(frozen=True, slots=True)
class Leave:
    """When a client goes before its answer is whole."""

    after: int
    """Messages that it reads first; below 0: so many turns of the event loop after it has come, whatever they bring."""
    confirmed: bool
    """Whether it cancels and waits until its blocks are back, or is just gone."""


@dataclasses.dataclass(frozen=True, slots=True)
class Branch:
    """How a conversation goes on: it is forked at a token, and one turn more is said to the fork and to itself."""

    share: float
    """Of the tokens before the fork, those that the fork begins with."""
    turn: pb.GenerationSpec
    own_turn: pb.GenerationSpec


@dataclasses.dataclass(frozen=True, slots=True)
class Wish:
    """What one client wants."""

    number: int
    spec: pb.GenerationSpec
    arrives: int
    """Turns of the event loop before it comes."""
    tenant: str = ""
    priority: int = 0
    leave: Leave | None = None
    branch: Branch | None = None

    @property
    def selects(self) -> bool:
        """Whether nothing is answered before the best samples are known."""
        return self.spec.sampling.HasField("beam_width") or self.spec.sampling.HasField("best_of")


def make_wishes(seed: int, count: int) -> list[Wish]:
    """Returns random requests, the same for the same seed."""
    chance = random.Random(seed)
    return [_wish(chance, number) for number in range(count)]


def _wish(chance: random.Random, number: int) -> Wish:
    kind = chance.random()
    spec = pb.GenerationSpec(token_ids=pb.TokenIds(ids=_prompt(chance)))
    branch = leave = None
    if kind < _SEARCHES:
        _search(chance, spec)
    elif kind < _CONVERSATIONS:
        turns = [pb.GenerationSpec(token_ids=pb.TokenIds(ids=_tail(chance))) for _ in range(2)]
        for turn in (spec, *turns):
            _sample(chance, turn, number, most_tokens=_TURN_TOKENS, most_samples=1)
        branch = Branch(chance.random(), *turns)
    else:
        _sample(chance, spec, number, most_tokens=_MOST_TOKENS, most_samples=3)
    if branch is None and chance.random() < 0.2:
        spec.caching.salt = chance.choice(("", "pepper"))
        spec.caching.skip_read, spec.caching.skip_write = chance.random() < 0.5, chance.random() < 0.5
    if branch is None and chance.random() < 0.2:
        leave = Leave(chance.choice((-40, -7, -2, 0, 1, 2, 5, 12)), chance.random() < 0.5)
    return Wish(
        number,
        spec,
        arrives=chance.randrange(300),
        tenant=chance.choice("abc"),
        priority=chance.randrange(-2, 3),
        leave=leave,
        branch=branch,
    )


def _prompt(chance: random.Random) -> list[int]:
    """Returns a prompt; most begin as others do."""
    stem = chance.choice(_STEMS)[: chance.choice((0, 16, 33, 80, 97))]
    return [*stem, *_tail(chance)]


def _tail(chance: random.Random) -> list[int]:
    return [chance.randrange(250) for _ in range(chance.choice((1, 2, 15, 16, 17, 40)))]


def _search(chance: random.Random, spec: pb.GenerationSpec) -> None:
    """Makes it a beam search."""
    width = chance.randrange(1, 5)
    spec.sampling.beam_width, spec.sampling.n = width, chance.randrange(1, width + 1)
    spec.sampling.early_stopping = chance.random() < 0.5
    if chance.random() < 0.5:
        spec.sampling.length_penalty = chance.choice((-1.0, 0.0, 2.0))
    spec.stopping.max_tokens = chance.randrange(1, _BEAM_TOKENS)
    spec.stopping.ignore_eos = chance.random() < 0.5


def _sample(
    chance: random.Random, spec: pb.GenerationSpec, number: int, *, most_tokens: int, most_samples: int
) -> None:
    """Gives it random settings of sampling, of its end and of what is answered."""
    sampling, stopping, output = spec.sampling, spec.stopping, spec.output
    sampling.seed = number
    sampling.temperature = chance.choice((0.0, 0.7, 1.0, 1.4))
    if most_samples > 1:
        sampling.n = chance.choice((1, 1, *range(1, most_samples + 1)))
    if most_samples > 1 and chance.random() < 0.12:
        sampling.best_of = sampling.n + chance.randrange(3)
    settings: list[tuple[Any, str, Any]] = [
        (sampling, "top_k", chance.choice((1, 5, 40))),
        (sampling, "top_p", chance.choice((0.3, 0.8, 0.95))),
        (sampling, "min_p", chance.choice((0.02, 0.2))),
        (sampling, "typical_p", chance.choice((0.5, 0.9))),
        (sampling, "repetition_penalty", chance.choice((0.8, 1.3))),
        (sampling, "presence_penalty", chance.choice((-0.5, 0.6))),
        (sampling, "frequency_penalty", chance.choice((-0.4, 0.4))),
        (output, "logprobs", chance.choice((0, 3))),
        (output, "prompt_logprobs", chance.choice((0, 2))),
        (output, "echo", True),
        (stopping, "include_stop_str_in_output", True),
    ]
    for message, field, value in settings:
        if chance.random() < 0.2:
            setattr(message, field, value)
    if chance.random() < 0.2:
        sampling.logit_bias.update({token: chance.choice((-50.0, 2.0, 4.0)) for token in chance.sample(range(320), 6)})
    if chance.random() < 0.2:
        stopping.stop.extend(chance.sample(("a", "Q", "xy", "%", "e ", "0"), 3))
    if chance.random() < 0.2:
        stopping.stop_token_ids.extend(chance.sample(range(320), 5))
    stopping.max_tokens = chance.randrange(1, most_tokens)
    if chance.random() < 0.2:
        _constrain(chance, spec.constraint)
        return
    stopping.ignore_eos = chance.random() < 0.3
    if chance.random() < 0.2:
        stopping.min_tokens = chance.randrange(stopping.max_tokens + 1)


def _constrain(chance: random.Random, constraint: pb.Constraint) -> None:
    """Says what a completion must look like."""
    kind = chance.randrange(4)
    if kind == 0:
        constraint.json_schema = json.dumps(chance.choice(_SCHEMAS))
    elif kind == 1:
        constraint.regex = "[a-z]{3,30}(-[0-9]+)?"
    elif kind == 2:
        constraint.choice.texts.extend(["yes", "no", "perhaps, and perhaps not"])
    else:
        constraint.grammar = _GRAMMAR


class _Ear:
    """Puts messages together; the context of a call that names a tenant, for what a session writes."""

    def __init__(self, tenant: str = "") -> None:
        self.answer: Answer = {}
        self.preemption_count = 0
        self._tenant = tenant

    def invocation_metadata(self) -> list[tuple[str, str]]:
        """Says whose call it is."""
        return [("tenant", self._tenant)]

    def hear(self, event: pb.GenerateStreamResponse) -> None:
        """Takes one message."""
        for sample in event.delta.samples:
            self._add(sample.index, sample.text, tuple(sample.token_ids), sample.logprobs)
            if sample.HasField("ending"):
                ending = sample.ending.SerializeToString(deterministic=True)
                self.answer[sample.index] = dataclasses.replace(self.answer[sample.index], ending=ending)
        self.preemption_count += event.finished.usage.preemption_count
        if event.HasField("prompt_logprobs"):
            self._add(-1, "", (), event.prompt_logprobs.tokens)

    def _add(self, index: int, text: str, tokens: tuple[int, ...], logprobs: Any) -> None:
        said = self.answer.get(index, Said())
        rows = tuple(
            (row.token_id, row.logprob, row.rank, tuple((top.token_id, top.logprob) for top in row.top))
            for row in logprobs
        )
        self.answer[index] = Said(said.text + text, said.tokens + tokens, said.logprobs + rows)

    async def write(self, response: session_pb2.AppendSessionResponse) -> None:
        """Takes what a session answers."""
        self.hear(response.event)


async def _submit(world: TinyWorld, spec: pb.GenerationSpec, tenant: str = "") -> RequestStream:
    settings = await check_for(world.config, spec, world.engine.find_model(""))
    return world.engine.submit(dataclasses.replace(settings, tenant=tenant))


async def answer_alone(world: TinyWorld, spec: pb.GenerationSpec) -> Answer:
    """Returns the answer to a request to a server that does nothing else, and finds nothing in its cache."""
    alone = pb.GenerationSpec()
    alone.CopyFrom(spec)
    alone.caching.skip_read = alone.caching.skip_write = True
    ear, stream = _Ear(), await _submit(world, alone)
    async for event in stream.events():
        ear.hear(event)
    await stream.wait_released()
    return ear.answer


async def all_alone(world: TinyWorld, wish: Wish) -> list[Answer]:
    """Returns what `answer` must return: each turn of a conversation is asked as one whole prompt, all of it new."""
    answers = [await answer_alone(world, wish.spec)]
    if wish.branch is None:
        return answers
    said = [*wish.spec.token_ids.ids, *answers[0][0].tokens]
    for start, turn in ((int(wish.branch.share * len(said)), wish.branch.turn), (len(said), wish.branch.own_turn)):
        whole = pb.GenerationSpec()
        whole.CopyFrom(turn)
        whole.token_ids.ids[:] = [*said[:start], *turn.token_ids.ids]
        answers.append(await answer_alone(world, whole))
    return answers


async def answer(world: TinyWorld, sessions: SessionService, wish: Wish) -> tuple[list[Answer], int]:
    """Returns the answers that a client gets in company, and how often its samples were preempted, as it is told."""
    for _ in range(wish.arrives):
        await asyncio.sleep(0)
    if wish.branch is not None:
        return await _converse(world, sessions, wish, wish.branch), 0
    spec = pb.GenerationSpec()
    spec.CopyFrom(wish.spec)
    if world.config.scheduling_policy == "priority":
        spec.scheduling.priority = wish.priority
    ear, stream = _Ear(), await _submit(world, spec, wish.tenant)
    reading = asyncio.create_task(_read(stream, ear, None if wish.leave is None else wish.leave.after))
    if wish.leave is not None:
        if wish.leave.after < 0:
            for _ in range(-wish.leave.after):
                await asyncio.sleep(0)
            reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        if wish.leave.confirmed:
            await world.engine.cancel(stream.settings.request_id, wish.tenant)
        else:
            world.engine.abandon(stream)
    await asyncio.gather(reading, return_exceptions=wish.leave is not None)
    return [ear.answer], ear.preemption_count


async def _read(stream: RequestStream, ear: _Ear, count: int | None) -> None:
    """Reads to the end, or `count` messages."""
    if count == 0:
        return
    async for event in stream.events():
        ear.hear(event)
        if count is not None and count > 0:
            count -= 1
            if not count:
                return


async def _converse(world: TinyWorld, service: Any, wish: Wish, branch: Branch) -> list[Answer]:
    """Says the turns of a conversation, those to the fork and to the session at the same time."""
    name = f"session-{wish.number}"
    await service.CreateSession(session_pb2.CreateSessionRequest(session_id=name), _Ear(wish.tenant))

    async def say(session_id: str, turn: pb.GenerationSpec) -> Answer:
        ear = _Ear(wish.tenant)
        await service.AppendSession(session_pb2.AppendSessionRequest(session_id=session_id, turn=turn), ear)
        return ear.answer

    first = await say(name, wish.spec)
    at_token = int(branch.share * (len(wish.spec.token_ids.ids) + len(first[0].tokens)))
    request = session_pb2.ForkSessionRequest(session_id=name, at_token=at_token)
    (fork,) = (await service.ForkSession(request, _Ear(wish.tenant))).sessions
    answers = await asyncio.gather(say(fork.session_id, branch.turn), say(name, branch.own_turn))
    for session_id in (fork.session_id, name):
        await service.DeleteSession(session_pb2.DeleteSessionRequest(session_id=session_id), _Ear(wish.tenant))
    return [first, *answers]
