"""Requests at once through a whole system, beside peers that get as many of the same lengths, in alternation."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import statistics
import sys
from typing import Any, Final

from quire.cli.measuring import read_document
from quire.errors import QuireError
from quire.peers.process import Peer

SYSTEM: Final = "quire"


@dataclasses.dataclass(frozen=True, slots=True)
class Requests:
    """A workload."""

    count: int
    prompt: int
    """Tokens of each prompt."""
    output: int
    """Tokens generated for each."""

    def __str__(self) -> str:
        return f"{self.count} x ({self.prompt}, {self.output})"


def _through_the_system(address: str, requests: Requests) -> float:
    """Returns the seconds that a gateway's clients see.

    Raises:
        QuireError: a request fails, or prompts come from the cache: peers compute theirs.
    """
    command = [sys.executable, "-m", "gateway.bench.serve", "--address", address]
    command += ["--distribution", f"fixed:{requests.prompt},{requests.output}", "--num-prompts", str(requests.count)]
    document = read_document(command, "load", lambda _: None)
    if document["completed"] != requests.count:
        raise QuireError(f"{address}: failed: {document['failures'] or 'too long'}", reason="BENCH_FAILED")
    if document["cached_prompt_share"] > 0:
        message = f"{address}: prompts come from its cache, and peers compute theirs: serve with prefix caching off"
        raise QuireError(message, reason="BENCH_FAILED")
    return float(document["duration_s"])


def compare_load(
    address: str, workloads: list[Requests], peers: list[Peer], rounds: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Returns a row for each workload: output tokens a second, medians of rounds in which everyone has a turn.

    Args:
        address: of a gateway.
        workloads: what to send at once.
        peers: that run.
        rounds: turns of each, after one that is not counted.
        say: is told how far it is.
    """
    rows: list[dict[str, Any]] = []
    for requests in workloads:
        seconds: dict[str, list[float]] = {SYSTEM: [], **{peer.name: [] for peer in peers}}
        for number in range(rounds + 1):
            say(f"{requests}, round {number} of {rounds}")
            turns = {SYSTEM: _through_the_system(address, requests)}
            for peer in peers:
                shape = dataclasses.asdict(requests)
                turns[peer.name] = float(peer.ask(what="serve", seed=1000 * len(rows) + number, **shape)["seconds"])
            for name, value in turns.items():
                seconds[name] += [value] if number else []
        made = requests.count * requests.output
        rates = {name: made / statistics.median(found) for name, found in seconds.items()}
        mine = rates.pop(SYSTEM)
        rows.append(
            {
                "case": str(requests),
                "tokens_per_second": mine,
                "peers": rates,
                "ratios": {name: mine / rate for name, rate in rates.items()},
                "seconds": seconds,
            }
        )
    return rows
