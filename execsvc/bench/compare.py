"""The engine beside other servers' engines: the same work in alternation, on as many threads."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import functools
import statistics
from typing import Any

from execsvc.bench.report import Request, environment
from execsvc.bench.workload import Bench
from execsvc.loading import choose_device, load
from quire.peers.process import Peer, PeerChoice

_WARMUP = 2


def compare(request: Request, peers: list[PeerChoice], rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Returns one document: what computes, and a row for each case with medians in tokens a second.

    Args:
        request: what to measure.
        peers: the others.
        rounds: of each case; in each of them every engine has a turn.
        say: is told how far it is.

    Raises:
        QuireError: the model cannot be loaded as asked, or a peer fails.
    """
    config = request.config
    longest, most = config.max_model_len or 0, max(request.batches)
    say(f"loading {config.model}")
    loaded = load(config)
    about = environment(choose_device(config.device))
    bench = Bench(loaded.engine)
    with contextlib.ExitStack() as stack:
        running = []
        for choice in peers:
            say(f"starting {choice.name}")
            running.append(stack.enter_context(Peer(choice, about["threads"], longest, most)))
        rows = [
            _row(
                f"decode {batch} x {context}",
                batch,
                functools.partial(_decode, bench, batch, context, request.steps),
                {"what": "decode", "batch": batch, "context": context, "steps": request.steps},
                (running, rounds, say),
            )
            for context in request.contexts
            for batch in request.batches
            if bench.fits(batch, context, _WARMUP + request.steps)
        ]
        rows += [
            _row(
                f"prompt of {length}",
                length,
                functools.partial(_prefill, bench, length),
                {"what": "prefill", "length": length},
                (running, rounds, say),
            )
            for length in request.prompts
            if bench.fits(1, length, 1)
        ]
        return {
            "environment": about,
            "model": config.model,
            "attention_backend": loaded.attention_backend,
            "rounds": rounds,
            "peers": {peer.name: peer.about for peer in running},
            "rows": rows,
        }


def _decode(bench: Bench, batch: int, context: int, steps: int) -> float:
    return bench.decode(batch, context, _WARMUP, steps)[0].median


def _prefill(bench: Bench, length: int) -> float:
    return bench.prefill(length, 2).median


def _row(
    case: str,
    tokens: int,
    ours: Callable[[], float],
    question: dict[str, Any],
    turns: tuple[list[Peer], int, Callable[[str], None]],
) -> dict[str, Any]:
    """Returns the rates of one case: (case, what it is in tokens, our seconds, what peers are asked, whose turns)."""
    peers, rounds, say = turns
    seconds: dict[str, list[float]] = {"": [], **{peer.name: [] for peer in peers}}
    for number in range(rounds):
        say(f"{case}, round {number + 1} of {rounds}")
        seconds[""].append(ours())
        for peer in peers:
            extra = {"seed": number} if question["what"] == "prefill" else {}
            seconds[peer.name].append(float(peer.ask(**question, **extra)["seconds"]))
    medians = {name: tokens / statistics.median(found) for name, found in seconds.items()}
    mine = medians.pop("")
    return {
        "case": case,
        "tokens_per_second": mine,
        "peers": medians,
        "ratios": {name: mine / rate for name, rate in medians.items()},
        "seconds": seconds | {"quire": seconds.pop("")},
    }
