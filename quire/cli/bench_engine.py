"""`quire bench engine`: what a model costs on this machine, through the engine that serves."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from quire.cli.comparing import describe_peers, print_rates
from quire.cli.measuring import run_measurements
from quire.cli.options import Json
from quire.cli.output import console, print_json, print_table

Numbers = str


def engine(
    *,
    model: Annotated[
        str, typer.Option(metavar="PATH", help="GGUF file, directory, or config.json with --load-format dummy.")
    ] = "smollm2",
    load_format: Annotated[str, typer.Option(metavar="FORMAT", help="auto, or dummy for random weights.")] = "auto",
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(metavar="TYPE", help="Element type to compute in.")] = "auto",
    quantization: Annotated[str, typer.Option(metavar="BITS", help="Weights on a CPU: none, int8 or int4.")] = "none",
    kv_cache_dtype: Annotated[
        str, typer.Option(metavar="TYPE", help="auto, fp8_e4m3 (GPU) or int8_per_token_head (CPU).")
    ] = "auto",
    batches: Annotated[Numbers, typer.Option(metavar="N,..", help="Sequences that decode at once.")] = "1,16,64,256",
    contexts: Annotated[Numbers, typer.Option(metavar="N,..", help="Tokens that each of them has.")] = "512,2048,8192",
    prompts: Annotated[Numbers, typer.Option(metavar="N,..", help="Lengths of prompts to compute.")] = "2048,8192",
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Decode steps timed for each of them.")] = 32,
    peer: Annotated[
        str | None,
        typer.Option(
            metavar="PEER",
            help="A Python with transformers, or auto for this one; or vllm=PYTHON,llamacpp=PYTHON for a comparison.",
        ),
    ] = None,
    peer_model: Annotated[
        str | None,
        typer.Option(metavar="NAME=PATH,..", help="Models of these: a directory for vllm, a GGUF for llamacpp."),
    ] = None,
    num_threads: Annotated[int | None, typer.Option(min=1, metavar="N", help="CPU threads, peers' as well.")] = None,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Turns of each engine in a comparison.")] = 5,
    as_json: Json = False,
) -> None:
    """Measure the engine: decode steps, prompts, the host's part, beside what the device can do at most.

    Weights and cache are those of the model; contexts are not computed before they are decoded. Figures are medians.

    For example: quire bench engine --model ./config.json --load-format dummy --batches 1,64
    """
    command = [sys.executable, "-m", "execsvc.bench", "--model", model, "--load-format", load_format]
    command += ["--device", device, "--dtype", dtype]
    command += ["--quantization", quantization, "--kv-cache-dtype", kv_cache_dtype]
    command += ["--batches", batches, "--contexts", contexts, "--prompts", prompts, "--steps", str(steps)]
    for flag, value in (("--peer", peer), ("--peer-model", peer_model), ("--num-threads", num_threads)):
        command += [] if value is None else [flag, str(value)]
    document = run_measurements([*command, "--rounds", str(rounds)])
    if as_json:
        print_json(document)
    elif "rows" in document:
        show_comparison(document)
    else:
        show(document)


def show_comparison(document: dict[str, Any]) -> None:
    """Prints ours beside the peers': tokens a second, and how many times as many."""
    environment, peers = document["environment"], document["peers"]
    console().print(
        f"{document['model']} on {environment['device']}; medians of {document['rounds']} rounds; "
        f"threads: quire: {environment['threads']}, {describe_peers(peers)}",
        soft_wrap=True,
    )
    print_rates(document["rows"], peers)


def show(document: dict[str, Any]) -> None:
    """Prints the figures for people."""
    printer, environment = console(), document["environment"]
    printer.print(
        f"{document['model']}, {document['parameters']:,} weights in {document['dtype']} on {environment['device']}"
    )
    peers = {(row["batch"], row["context"]): row for row in document.get("peer", {}).get("decode", ())}
    headings = [("decode", False), ("step (us)", True), ("10 % .. 90 %", True), ("tokens/s", True)]
    headings += [("of copy bandwidth", True), ("host (us)", True)] + ([("peer tokens/s", True)] if peers else [])
    rows = []
    for row in document["decode"]:
        name = f"{row['batch']} x {row['context']}"
        if "skipped" in row:
            rows.append([name, row["skipped"], *[""] * (len(headings) - 2)])
            continue
        step, host = row["step_us"], row.get("host_us")
        cells = [name, f"{step['median']:,.0f}", f"{step['low']:,.0f} .. {step['high']:,.0f}"]
        cells += [f"{row['tokens_per_second']:,.0f}", f"{row['share_of_copy_bandwidth']:.0%}"]
        cells.append(f"{host['median']:,.0f}" if host else "")
        if peers:
            rate = peers.get((row["batch"], row["context"]), {}).get("tokens_per_second")
            cells.append(f"{rate:,.0f}" if rate else "")
        rows.append(cells)
    print_table(headings, rows)
    printer.print()
    rows = [
        [str(row["length"]), row["skipped"], ""]
        if "skipped" in row
        else [str(row["length"]), f"{row['tokens_per_second']:,.0f}", f"{row['share_of_matmul_rate']:.0%}"]
        for row in document["prefill"]
    ]
    print_table([("prompt", False), ("tokens/s", True), ("of matmul rate", True)], rows)
    printer.print()
    _show_notes(document)


def _show_notes(document: dict[str, Any]) -> None:
    """Prints what the figures are compared with."""
    printer, ceilings, part = console(), document["ceilings"], document["host_part"]
    span = f"{part['median_us']:,.0f} us ({part['low_us']:,.0f} .. {part['high_us']:,.0f})"
    bandwidth, flops = ceilings["copy_bytes_per_second"] / 1e9, ceilings["matmul_flops"] / 1e12
    lines = [
        f"the device copies {bandwidth:,.1f} GB/s and multiplies {flops:,.2f} TFLOP/s, measured in this run",
        f"the host's part of a GPU step of {part['batch']} sequences, on this CPU, launches left out: {span}",
    ]
    peer = document.get("peer")
    if peer is not None:
        lines.append(f"peer: {peer['name']}" if "name" in peer else f"no peer: {peer['skipped']}")
    for line in lines:
        printer.print(line, soft_wrap=True)
