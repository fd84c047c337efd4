"""`quire bench serve`: load on a running endpoint, and what its clients saw."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Final

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
import typer

from quire.cli import options
from quire.cli.measuring import read_document
from quire.cli.output import console, notices, print_json, print_table
from quire.errors import ConfigError

_BACKENDS: Final = ("quire", "openai")
_PROGRESS_PARTS: Final = 6


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
    as_json: options.Json = False,
) -> None:
    """Load a running endpoint and measure what its clients see.

    Open loop with --request-rate or --replay: requests are sent when they are due, whether others have ended or not.
    Closed loop with --max-concurrency alone: the next one is sent when one has ended.

    For example: quire bench serve --request-rate 4 --num-prompts 400 --goodput ttft:500 --goodput tpot:50
    """
    if backend not in _BACKENDS:
        raise ConfigError(f"--backend: found {backend!r}, allowed are {', '.join(_BACKENDS)}", field="backend")
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
        ["computed twice", f"{document['recompute_tax']:.2%} ({document['preemptions']:,} preemptions)"],
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
