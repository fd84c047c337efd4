"""The other end of `quire.peers.process`: reads requests, prints answers. Imported by scripts, so it needs nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import json
import os
import random
import sys
from typing import Any, Protocol, TextIO


class Engine(Protocol):
    """What a peer can be asked for."""

    about: dict[str, Any]

    def decode(self, batch: int, context: int, steps: int) -> dict[str, Any]:
        """Returns {"seconds": of a step} of `batch` sequences of `context` tokens."""
        ...

    def prefill(self, length: int, seed: int) -> dict[str, Any]:
        """Returns {"seconds": of a prompt of `length` tokens}."""
        ...

    def serve(self, count: int, prompt: int, output: int, seed: int) -> dict[str, Any]:
        """Returns {"seconds": of `count` requests at once, "tokens": that came of them}."""
        ...


def take_standard_output() -> TextIO:
    """Returns standard output and has all that others print go to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def prompts(count: int, length: int, seed: int, vocab: int) -> list[list[int]]:
    """Returns token ids, others for each seed."""
    draw = random.Random(seed)  # noqa: S311 - only to be different
    return [[draw.randrange(100, vocab) for _ in range(length)] for _ in range(count)]


def run(answers: TextIO, make: Callable[[dict[str, Any]], Engine]) -> None:
    """Makes the engine that the arguments describe and answers until standard input ends."""
    engine = make(json.loads(sys.argv[1]))
    for answer in _answers(engine):
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answers(engine: Engine) -> Iterator[dict[str, Any]]:
    yield engine.about
    for line in sys.stdin:
        request = json.loads(line)
        yield getattr(engine, request.pop("what"))(**request)
