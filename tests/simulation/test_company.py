"""What a request asks of sampling gives the same alone and in any company: on the real executor with a tiny model."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import random
from typing import Any

import pytest
from tokenizers import Tokenizer

from execsvc.grammars import Grammars
from gateway.tokenize import TokenizerFiles
from protos.execsvc.v1 import execsvc_pb2
from protos.gateway.v1 import gateway_pb2 as pb
from quire.errors import ExecutorUnavailableError
from tests.simulation.oracle_executor import tokenizer_files
from tests.simulation.world import World, ids, running
from tests.unit.execsvc import tiny

pytestmark = pytest.mark.usefixtures("both_ways")

EOS_TOKEN = 256
MODEL = dataclasses.replace(tiny.CONFIG, num_layers=2)
BLOCKS = 26


class TinyExecutor:
    """`gateway.clients.executor.ExecutorLink` on an engine with a tiny model."""

    def __init__(self) -> None:
        tokenizer = Tokenizer.from_str(tokenizer_files().tokenizer_json.decode())
        tokenizer.add_special_tokens(["<end>"])
        self._tokenizer = tokenizer.to_str()
        self.engine = tiny.engine_of(
            MODEL, blocks=BLOCKS, max_num_seqs=16, max_num_batched_tokens=64, max_model_len=256
        )
        self.engine.grammars = Grammars(self._tokenizer, MODEL.vocab_size, [EOS_TOKEN])
        self.incarnation = 1
        self.fail_at_step = 0
        self._steps = 0
        self._open = False
        self._turn = asyncio.Lock()

    @property
    def rows(self) -> list[int]:
        """Tables that are open."""
        return self.engine.open_tables

    async def describe(self) -> execsvc_pb2.DescribeResponse:
        """See ExecutorLink."""
        model = execsvc_pb2.ModelInfo(
            name="tiny", vocab_size=MODEL.vocab_size, max_model_len=256, eos_token_ids=[EOS_TOKEN]
        )
        return execsvc_pb2.DescribeResponse(
            executor_incarnation=1, ready=True, model=model, max_num_batched_tokens=64, max_num_seqs=16
        )

    async def tokenizer(self) -> TokenizerFiles:
        """See ExecutorLink."""
        data = self._tokenizer.encode()
        return TokenizerFiles(data, hashlib.sha256(data).digest(), "", "", "<end>")

    async def open(self, request: execsvc_pb2.Open) -> execsvc_pb2.Opened:
        """See ExecutorLink."""
        async with self._turn:
            self.engine.drop_all()
            self.engine.begin_epoch(request.epoch)
            self._open = True
        return execsvc_pb2.Opened(epoch=request.epoch)

    async def run(self, plan: execsvc_pb2.StepPlan) -> execsvc_pb2.StepResult:
        """See ExecutorLink."""
        async with self._turn:
            await asyncio.sleep(0)
            self._steps += 1
            if self._steps == self.fail_at_step:
                self._open = False
            if not self._open:
                raise ExecutorUnavailableError("the session is over")
            result = self.engine.apply(plan)
            assert not result.errors, result.errors
            return result

    async def close(self) -> None:
        """See ExecutorLink."""
        self._open = False


def wish(chance: random.Random, number: int) -> dict[str, Any]:
    """Returns the fields of a random request."""
    sampling = pb.Sampling(seed=number, temperature=chance.choice((0.0, 0.8, 1.3)), n=chance.choice((1, 1, 2, 3)))
    stopping = pb.Stopping(max_tokens=chance.randrange(1, 50))
    fields: dict[str, Any] = {"sampling": sampling, "stopping": stopping, "output": pb.Output()}
    kind = chance.randrange(6)
    if kind == 0:
        sampling.repetition_penalty, sampling.frequency_penalty = 1.3, 0.4
    elif kind == 1:
        sampling.top_k, sampling.typical_p, sampling.presence_penalty = 40, 0.9, 0.6
        sampling.logit_bias.update({5: 4.0, 9: -50.0})
    elif kind == 2:
        fields["constraint"] = pb.Constraint(regex="[a-z]{3,30}(-[0-9]+)?")
    elif kind == 3:
        fields["sampling"] = pb.Sampling(beam_width=3, n=2)
    elif kind == 4:
        fields["output"].logprobs = 2
        stopping.min_tokens = min(3, stopping.max_tokens)
    else:
        sampling.top_p, sampling.min_p = 0.8, 0.02
    start = chance.randrange(60)
    fields["token_ids"] = ids([(start + 7 * place) % 250 for place in range(chance.randrange(1, 70))])
    return fields


async def answer(world: World, fields: dict[str, Any]) -> tuple[list[tuple[str, list[int], list[int]]], int]:
    """Returns text, tokens and ranks of each sample, and how often one was preempted."""
    stream = await world.submit(**fields)
    found: dict[int, tuple[str, list[int], list[int]]] = {}
    preemption_count = 0
    async for event in stream.events():
        preemption_count += event.finished.usage.preemption_count
        for sample in event.delta.samples:
            text, tokens, ranks = found.get(sample.index, ("", [], []))
            ranks = ranks + [entry.rank for entry in sample.logprobs]
            found[sample.index] = (text + sample.text, tokens + list(sample.token_ids), ranks)
    return [found[index] for index in sorted(found)], preemption_count


async def test_every_way_of_choosing_tokens_gives_the_same_alone_and_in_any_company() -> None:
    """Penalties, constraints, searches, seeds: beside others, preempted, in a lost session, each is as it is alone."""
    chance = random.Random(3)
    wishes = [wish(chance, number) for number in range(22)]
    world = World(BLOCKS, context=256)
    executor: Any = TinyExecutor()
    world.executor = executor
    async with running(world):
        executor.fail_at_step = 40
        together = await asyncio.gather(*(answer(world, fields) for fields in wishes))
        assert sum(preemptions for _, preemptions in together) > 0, "the pool was meant to be too small"
        for fields, (found, _) in zip(wishes, together, strict=True):
            alone, _ = await answer(world, fields)
            assert found == alone, fields
        await world.settle()
