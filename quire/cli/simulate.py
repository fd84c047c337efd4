"""`quire simulate`: what a pool would hold under each way to allocate it, without a model."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Final

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
import typer

from quire.cli.measuring import read_document
from quire.cli.options import Json
from quire.cli.output import console, notices, print_json, print_table
from quire.errors import ConfigError

_POLICIES: Final = ("paged", "reserve", "contiguous-oracle", "contiguous-pow2", "contiguous")
_PAPER: Final = {
    "paged": (0.963, 30.42),
    "contiguous-oracle": (0.382, 13.62),
    "contiguous-pow2": (0.268, 9.81),
    "contiguous": (0.204, 7.00),
}
"""Useful share and batch of the PagedAttention paper (SOSP 2023, figures 2 and 13), ShareGPT lengths."""
_BLOCK_SIZES: Final = (16, 32, 64)
_SECONDS_PER_HOUR: Final = 3600


def simulate(
    *,
    trace: Annotated[
        str | None,
        typer.Argument(metavar="TRACE", help="CSV or JSONL file of lengths; without it they are drawn."),
    ] = None,
    distribution: Annotated[
        str, typer.Option(metavar="NAME", help="Lengths to draw: sharegpt, or fixed:PROMPT,OUTPUT.")
    ] = "sharegpt",
    num_prompts: Annotated[int, typer.Option(min=0, help="Requests; 0: all of the trace, or 1000.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same lengths.")] = 0,
    arrivals: Annotated[str, typer.Option(metavar="HOW", help="saturated: all at once; trace: as they came.")] = (
        "saturated"
    ),
    policies: Annotated[str, typer.Option(metavar="NAMES", help="Policies, with commas between.")] = ",".join(
        _POLICIES
    ),
    max_model_len: Annotated[int, typer.Option(min=1, help="Longest sequence in tokens.")] = 2048,
    pool_tokens: Annotated[int, typer.Option(min=16, help="Token slots of the pool.")] = 14_336,
    swap_tokens: Annotated[
        int, typer.Option(min=0, help="Token slots in host memory that preempted sequences are swapped out to.")
    ] = 0,
    block_size: Annotated[int, typer.Option(metavar="TOKENS", help="Tokens in a block: 16, 32 or 64.")] = 16,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Most sequences that run at once.")] = 1024,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1, help="Tokens computed in a step.")] = 8192,
    step_ms: Annotated[float, typer.Option(min=0.001, help="Duration of a step, for arrivals and cost.")] = 30.0,
    bytes_per_token: Annotated[int | None, typer.Option(min=1, help="KV cache bytes a token: prints GiB.")] = None,
    price_per_gpu_hour: Annotated[float | None, typer.Option(min=0.0, help="Prints the cost of tokens.")] = None,
    plot: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Draw memory over time by policy into a .png or .svg file."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Replay requests through the real memory core and scheduler under several allocation policies.

    Nothing is computed: a step takes no time but counts as one. Utilization is useful tokens by token slots of the
    pool, over the steps in which requests waited; the recompute tax is the share of computed tokens that a preemption
    had thrown away.

    For example: quire simulate conversations.csv --max-model-len 8192 --pool-tokens 440000
    """
    _check(block_size, arrivals, policies)
    command = [sys.executable, "-m", "gateway.simulate", "--arrivals", arrivals, "--policies", policies]
    command += ["--trace", trace] if trace is not None else ["--distribution", distribution]
    for name, value in (
        ("num-prompts", num_prompts),
        ("seed", seed),
        ("block-size", block_size),
        ("max-model-len", max_model_len),
        ("pool-tokens", pool_tokens),
        ("swap-tokens", swap_tokens),
        ("max-num-seqs", max_num_seqs),
        ("max-num-batched-tokens", max_num_batched_tokens),
        ("step-ms", step_ms),
    ):
        command += [f"--{name}", str(value)]
    if plot is not None:
        command += ["--plot", plot]
    document = _run(command)
    for figures in document["policies"].values():
        if bytes_per_token is not None:
            figures["pool_gib"] = pool_tokens * bytes_per_token / 2**30
        if price_per_gpu_hour is not None:
            tokens_per_hour = figures["goodput_tokens_per_step"] * _SECONDS_PER_HOUR * 1000 / step_ms
            figures["cost_per_million_tokens"] = price_per_gpu_hour / tokens_per_hour * 1e6 if tokens_per_hour else None
    if as_json:
        print_json(document)
    else:
        _print(document, is_paper=trace is None and distribution == "sharegpt")
        if plot is not None:
            notices().print(f"drawn into {plot}")


def _check(block_size: int, arrivals: str, policies: str) -> None:
    if block_size not in _BLOCK_SIZES:
        raise ConfigError(f"--block-size: found {block_size}, allowed are 16, 32 and 64", field="block_size")
    if arrivals not in {"saturated", "trace"}:
        raise ConfigError(f"--arrivals: found {arrivals!r}, allowed are saturated and trace", field="arrivals")
    for name in policies.split(","):
        if name not in _POLICIES:
            message = f"--policies: found {name!r}, allowed are {', '.join(_POLICIES)}"
            raise ConfigError(message, field="policies")


def _run(command: list[str]) -> dict[str, Any]:
    """Runs the simulation in a process of its own and returns its document; shows its progress.

    Raises:
        ConfigError: a setting or the trace is not possible.
        QuireError: it failed otherwise.
    """
    columns = (TextColumn("{task.description:18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=notices(), transient=True) as progress:
        task = progress.add_task("reading")

        def say(line: str) -> None:
            parts = line.split()
            if len(parts) == 3 and parts[0] in _POLICIES:  # noqa: PLR2004 - policy, done, total
                progress.update(task, description=parts[0], completed=int(parts[1]), total=int(parts[2]))

        return read_document(command, "simulation", say, failure="SIMULATION_FAILED")


def _print(document: dict[str, Any], *, is_paper: bool) -> None:
    """Prints the figures for people."""
    names = ("policy", "useful", "recomputed", "running", "tokens a step", "internal", "external", "reserved")
    headings = [(name, name != "policy") for name in (*names, "hits", "rejected", "steps")]
    costs = [
        name
        for name in ("pool_gib", "cost_per_million_tokens")
        if any(name in figures for figures in document["policies"].values())
    ]
    headings += [(name.replace("_", " "), True) for name in costs]
    swaps = any(figures["swapped_blocks"] for figures in document["policies"].values())
    headings += [("blocks swapped", True)] if swaps else []
    headings += [("paper: useful, batch", True)] if is_paper else []
    rows = []
    for policy, figures in document["policies"].items():
        shares = [f"{figures[name]:.1%}" for name in ("utilization", "recompute_tax")]
        rates = [f"{figures[name]:.1f}" for name in ("mean_concurrency", "goodput_tokens_per_step")]
        wastes = [f"{figures[name]:.1%}" for name in ("internal_waste", "external_waste", "reservation_waste")]
        row = [policy, *shares, *rates, *wastes, f"{figures['prefix_hit_rate']:.1%}"]
        row += [str(figures["rejected_count"]), f"{figures['steps']:,}"]
        row += [f"{figures[name]:.3g}" if figures[name] is not None else "" for name in costs]
        if swaps:
            row.append(f"{figures['swapped_blocks']:,}")
        if is_paper:
            row.append(f"{_PAPER[policy][0]:.1%}, {_PAPER[policy][1]}" if policy in _PAPER else "")
        rows.append(row)
    console().print(f"{document['workload']['requests']:,} requests of {document['workload']['name']}")
    print_table(headings, rows)
