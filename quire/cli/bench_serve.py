"""`quire bench serve`: load on a running endpoint, and what its clients saw."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated, Any, Final

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
import typer

from quire.cli import options
from quire.cli.comparing import describe_peers, print_rates
from quire.cli.measuring import read_document
from quire.cli.output import console, notices, print_json, print_table
from quire.errors import ConfigError
from quire.peers.load import Requests, compare_load
from quire.peers.process import Peer, PeerChoice, choices

_BACKENDS: Final = ("quire", "openai")
_PROGRESS_PARTS: Final = 6
_SPARE: Final = 64


def serve(
    *,
    trace: Annotated[
        str | None,
        typer.Argument(metavar="TRACE", help="CSV or JSONL file of lengths; without it they are drawn."),
    ] = None,
    address: Annotated[
        str, typer.Option(metavar="ADDRESS", help="HOST:PORT of a gateway, or the URL of another server.")
    ] = options.GATEWAY_ADDRESS,
    backend: Annotated[
        str, typer.Option(metavar="NAME", help="quire, or openai for servers with POST /v1/completions.")
    ] = "quire",
    model: Annotated[str, typer.Option(help="Model; not needed where one is served.")] = "",
    distribution: Annotated[
        str, typer.Option(metavar="NAME", help="Lengths to draw: sharegpt, or fixed:PROMPT,OUTPUT.")
    ] = "sharegpt",
    num_prompts: Annotated[int, typer.Option(min=0, help="Requests; 0: all of the trace, or 200.")] = 0,
    request_rate: Annotated[
        float | None, typer.Option(min=0.001, help="Requests a second, at random times; all at once without it.")
    ] = None,
    burstiness: Annotated[
        float, typer.Option(min=0.01, help="1: Poisson arrivals; less: burstier; more: more even.")
    ] = 1.0,
    replay: Annotated[bool, typer.Option("--replay", help="Send at the times of the trace.")] = False,
    max_concurrency: Annotated[int, typer.Option(min=0, help="Most requests under way; 0 for no limit.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same lengths and times.")] = 0,
    goodput: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:MS", help="What a good request meets: ttft, tpot or e2el; may be repeated."),
    ] = None,
    memsvc: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="HOST:PORT of a memory service: memory over time.")
    ] = None,
    stop_at_eos: Annotated[
        bool, typer.Option("--stop-at-eos", help="End where the model ends, not after as many tokens as drawn.")
    ] = False,
    vocab_size: Annotated[int, typer.Option(min=2, help="Token ids of the model, for openai alone.")] = 32_000,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE", help="Draw load, memory and waits into a .png or .svg file.")
    ] = None,
    peer: Annotated[
        str | None,
        typer.Option(metavar="NAME=PYTHON,..", help="Beside vllm=PYTHON,llamacpp=PYTHON, with fixed lengths."),
    ] = None,
    peer_model: Annotated[
        str | None,
        typer.Option(metavar="NAME=PATH,..", help="Models of peers: a directory for vllm, a GGUF for llamacpp."),
    ] = None,
    num_threads: Annotated[int, typer.Option(min=1, metavar="N", help="CPU threads of each peer.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Turns of each beside peers.")] = 3,
    as_json: options.Json = False,
) -> None:
    """Load a running endpoint and measure what its clients see.

    Open loop with --request-rate or --replay: requests are sent when they are due, whether others have ended or not.
    Closed loop with --max-concurrency alone: the next one is sent when one has ended.

    For example: quire bench serve --request-rate 4 --num-prompts 400 --goodput ttft:500 --goodput tpot:50
    """
    if backend not in _BACKENDS:
        raise ConfigError(f"--backend: found {backend!r}, allowed are {', '.join(_BACKENDS)}", field="backend")
    if peer is not None:
        requests = _fixed(distribution, num_prompts)
        found = beside_peers(address, [requests], choices(peer, peer_model or ""), num_threads, rounds)
        show_beside_peers(found, as_json=as_json)
        return
    command = [sys.executable, "-m", "gateway.bench.serve", "--address", address, "--backend", backend]
    for name, value in (
        ("model", model),
        ("trace", trace),
        ("distribution", distribution),
        ("num-prompts", num_prompts),
        ("request-rate", request_rate),
        ("burstiness", burstiness),
        ("max-concurrency", max_concurrency),
        ("seed", seed),
        ("memsvc", memsvc),
        ("vocab-size", vocab_size),
        ("plot", plot),
    ):
        if value not in {None, ""}:
            command += [f"--{name}", str(value)]
    command += ["--replay"] if replay else []
    command += ["--stop-at-eos"] if stop_at_eos else []
    command += ["--goodput", *goodput] if goodput else []
    document = _run(command)
    if as_json:
        print_json(document)
    else:
        _print(document)
        if plot is not None:
            notices().print(f"drawn into {plot}")


def _fixed(distribution: str, count: int) -> Requests:
    """Returns the workload that peers can be given as well; raises ConfigError for another."""
    kind, _, lengths = distribution.partition(":")
    try:
        prompt, output = map(int, lengths.split(","))
    except ValueError:
        prompt = output = 0
    if kind != "fixed" or min(prompt, output) < 1:
        message = f"--distribution: found {distribution!r}; beside peers it is fixed:PROMPT,OUTPUT"
        raise ConfigError(message, field="distribution")
    return Requests(count or 1, prompt, output)


def beside_peers(
    address: str, workloads: list[Requests], peers: list[PeerChoice], threads: int, rounds: int
) -> dict[str, Any]:
    """Loads a gateway and peers in alternation; see `compare_load`. Raises QuireError if one fails."""
    # Engines take a block more than a sequence needs in the end.
    length = max(requests.prompt + requests.output for requests in workloads) + _SPARE
    most = max(requests.count for requests in workloads)
    with notices().status("starting peers") as status, contextlib.ExitStack() as stack:
        running = [stack.enter_context(Peer(choice, threads, length, most)) for choice in peers]
        rows = compare_load(address, workloads, running, rounds, status.update)
    return {"rounds": rounds, "peers": {peer.name: peer.about for peer in running}, "rows": rows}


def show_beside_peers(document: dict[str, Any], *, as_json: bool) -> None:
    """Prints what `beside_peers` found."""
    if as_json:
        print_json(document)
        return
    peers = document["peers"]
    console().print(f"medians of {document['rounds']} rounds; threads of {describe_peers(peers)}", soft_wrap=True)
    print_rates(document["rows"], peers, "output tokens/s")


def _run(command: list[str]) -> dict[str, Any]:
    """Runs the load and returns its document, behind a progress bar; raises as `read_document`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=notices(), transient=True) as progress:
        task = progress.add_task("requests", state="")

        def say(line: str) -> None:
            parts = line.split()
            if len(parts) == _PROGRESS_PARTS and parts[0] == "progress":
                done, total, running, failed, tokens = map(int, parts[1:])
                state = f"{running} under way, {failed} failed, {tokens:,} tokens"
                progress.update(task, completed=done, total=total, state=state)

        return read_document(command, "load", say)


def _print(document: dict[str, Any]) -> None:
    """Prints the figures for people."""
    about = document["about"]
    printer = console()
    printer.print(f"{about['model']} at {about['address']}: {about['workload']}", soft_wrap=True)
    rows = [
        ["requests completed", f"{document['completed']:,} of {document['sent']:,} in {document['duration_s']:,.1f} s"],
        ["requests a second", f"{document['request_throughput_per_s']:,.2f}"],
        ["output tokens a second", f"{document['output_throughput_tokens_per_s']:,.1f}"],
        ["all tokens a second", f"{document['total_throughput_tokens_per_s']:,.1f}"],
        ["prompt tokens from the cache", f"{document['cached_prompt_share']:.1%}"],
        [
            "computed twice",
            f"{document['recompute_tax']:.2%} ({document['preemptions']:,} preemptions, {document['swaps']:,} by swap)",
        ],
    ]
    if "goodput_share" in document:
        share = f"{document['goodput_requests_per_s']:,.2f} a second, {document['goodput_share']:.1%} of all"
        rows.append(["requests that met the objectives", share])
    if "kv_utilization" in document:
        used = document["kv_utilization"]
        rows.append(["token slots in use", f"{used['mean']:.1%} on average, {used['max']:.1%} at most"])
    rows += [[f"failed: {reason}", f"{count:,}"] for reason, count in document["failures"].items()]
    if document["skipped_too_long"]:
        rows.append(["too long for the model, not sent", f"{document['skipped_too_long']:,}"])
    rows.append(["the client itself was late by at most", f"{document['client_lateness_ms']:,.1f} ms"])
    print_table([("", False), ("", True)], rows)
    printer.print()
    names = {
        "ttft_ms": "time to first token",
        "tpot_ms": "time of a token after it",
        "itl_ms": "between messages",
        "e2el_ms": "to the end",
        "queue_ms": "in the queue",
        "refusal_ms": "until refused",
    }
    shown = {name: document[name] for name in names if document[name]}
    marks = list(next(iter(shown.values()), {}))
    if shown:
        headings = [("ms", False), *((mark, True) for mark in marks)]
        print_table(headings, [[names[name], *(f"{shown[name][mark]:,.1f}" for mark in marks)] for name in shown])
