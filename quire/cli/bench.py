"""`quire bench`: what Quire costs, measured on this machine, beside a peer if there is one."""

from __future__ import annotations

import shutil
import sys
from typing import Annotated, Any, Final

import typer

from quire.cli import bench_engine, bench_kernels, bench_serve
from quire.cli.measuring import run_measurements
from quire.cli.options import Json
from quire.cli.output import console, print_json, print_table
from quire.errors import ConfigError

_BLOCK_SIZES: Final = (16, 32, 64)
_ROUNDS_MAXIMUM: Final = 20

app = typer.Typer(
    name="bench",
    help="Measure what Quire costs on this machine.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["--help", "-h"]},
)


@app.callback()
def _group() -> None:
    """Measure what Quire costs on this machine."""


app.command()(bench_serve.serve)


@app.command()
def memory(
    *,
    peer: Annotated[
        str | None,
        typer.Option(metavar="PYTHON", help="A Python in which vllm is installed: the same work on its classes."),
    ] = None,
    block_size: Annotated[int, typer.Option(metavar="TOKENS", help="Tokens in a block: 16, 32 or 64.")] = 16,
    repeat: Annotated[
        int, typer.Option(min=1, max=_ROUNDS_MAXIMUM, metavar="N", help="Rounds; ours and the peer's alternate.")
    ] = 5,
    as_json: Json = False,
) -> None:
    """Measure the memory service: blocks, admissions, decode steps in process and over gRPC.

    Everything runs here and on loopback: no model, no device, no other service. Figures are medians.

    For example: quire bench memory --peer ~/vllm/bin/python
    """
    _measure("memory", peer, block_size, repeat, as_json=as_json)


@app.command()
def scheduler(
    *,
    peer: Annotated[
        str | None,
        typer.Option(metavar="PYTHON", help="A Python in which vllm is installed: the same steps of its scheduler."),
    ] = None,
    block_size: Annotated[int, typer.Option(metavar="TOKENS", help="Tokens in a block: 16, 32 or 64.")] = 16,
    repeat: Annotated[
        int, typer.Option(min=1, max=_ROUNDS_MAXIMUM, metavar="N", help="Rounds; ours and the peer's alternate.")
    ] = 5,
    as_json: Json = False,
) -> None:
    """Measure the scheduler's steps, and the whole gateway over gRPC around an executor without a model.

    Everything runs here and on loopback: no model, no device. Figures are medians. Linux only: the processor time of
    the services is read from /proc.

    For example: quire bench scheduler --peer ~/vllm/bin/python
    """
    _measure("scheduler", peer, block_size, repeat, as_json=as_json)


def _measure(what: str, peer: str | None, block_size: int, repeat: int, *, as_json: bool) -> None:
    """Measures and prints; raises ConfigError for a wrong option, QuireError for what failed."""
    if block_size not in _BLOCK_SIZES:
        raise ConfigError(f"--block-size: found {block_size}, allowed are 16, 32 and 64", field="block_size")
    command = [sys.executable, "-m", "gateway.bench", what, "--block-size", str(block_size), "--repeat", str(repeat)]
    if peer is not None:
        if shutil.which(peer) is None:
            message = f"--peer: {peer!r} is not a program; expected a Python in which vllm is installed"
            raise ConfigError(message, field="peer")
        command += ["--peer", peer]
    document = run_measurements(command)
    if as_json:
        print_json(document)
    else:
        _print(document)


def _print(document: dict[str, Any]) -> None:
    """Prints the figures for people, then what each of them is."""
    figures: dict[str, Any] = document["figures"]
    peer = document.get("peer", {})
    headings = [("figure", False), ("median", True), ("10 % .. 90 %", True), ("target", True)]
    if peer:
        headings += [(document["peer_environment"]["name"], True), ("better by", True)]
    rows = []
    for name, figure in figures.items():
        spread = document["spreads"].get(name)
        row = [
            name,
            f"{document[name]:,.1f}",
            f"{spread['low']:,.1f} .. {spread['high']:,.1f}" if spread else "",
            f"{'>=' if figure['higher'] else '<='} {figure['target']:g}",
        ]
        if peer:
            ratio = document["ratios"].get(name)
            row += [f"{peer[name]:,.1f}" if name in peer else "", f"{ratio:.1f}x" if ratio is not None else ""]
        rows.append(row)
    print_table(headings, rows)
    printer = console()
    printer.print()
    print_table(
        [("of which, beside which (us)", False), ("median", True), ("", False)],
        [
            [name.removesuffix("_us"), f"{value:,.1f}", document["part_notes"][name.removesuffix("_us")]]
            for name, value in [*document["parts"].items(), *document.get("peer_parts", {}).items()]
        ],
    )
    printer.print()
    for name, figure in figures.items():
        printer.print(f"{name}: {figure['note']}.", soft_wrap=True)


app.command(name="engine")(bench_engine.engine)
app.command(name="kernels")(bench_kernels.kernels)
