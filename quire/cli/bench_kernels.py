"""`quire bench kernels` and `quire tune`: the kernels on this machine's GPU."""

from __future__ import annotations

import sys
from typing import Any

from quire.cli.measuring import run_measurements
from quire.cli.options import Json
from quire.cli.output import console, print_json, print_table


def kernels(*, as_json: Json = False) -> None:
    """Measure each kernel on the GPU, beside what it can do at most and beside other libraries.

    Sizes are an 8B model's. The device's ceilings (a large copy, a large product) are measured in the same run; peers
    are those that can be imported: FlashInfer, FlashAttention-3, the Triton kernels of vLLM and SGLang, and torch.
    Figures are medians. Without a CUDA device it says so.

    For example: quire bench kernels --json
    """
    document = run_measurements([sys.executable, "-m", "kernels.bench", "--json"])
    if as_json:
        print_json(document)
    else:
        show(document)


def tune(*, as_json: Json = False) -> None:
    """Choose how kernels are launched on this GPU, by measuring, and write its table.

    The table lies with the kernels (`kernels/configs`), and is read when they are launched next. Without a CUDA device
    it says so, and nothing is written.

    For example: quire tune
    """
    document = run_measurements([sys.executable, "-m", "kernels.bench", "--tune", "--json"])
    if as_json:
        print_json(document)
        return
    rows = [
        [name, ", ".join(f"{option} {value}" for option, value in kernel["use"].items()), kernel["times_faster"]]
        for name, kernel in document["kernels"].items()
    ]
    print_table(
        [("kernel", False), ("options", False), ("than the defaults", True)],
        [[name, options, f"{times:.2f}x"] for name, options, times in rows],
    )
    console().print(f"written to {document['path']}", soft_wrap=True)


def show(document: dict[str, Any]) -> None:
    """Prints the figures for people."""
    printer, environment, ceilings = console(), document["environment"], document["ceilings"]
    printer.print(f"{environment['device']}, torch {environment['torch']}, triton {environment['triton']}")
    rows = []
    for kernel in document["kernels"]:
        share = kernel.get("share_of_copy", kernel.get("share_of_matmul"))
        limit = "copy" if "share_of_copy" in kernel else "product"
        span = kernel["us"]
        cells = [kernel["name"], f"{span['median']:,.1f}", f"{span['low']:,.1f} .. {span['high']:,.1f}"]
        peers = [
            f"{name} {peer['times_faster']:.2f}x" if "times_faster" in peer else f"{name} failed"
            for name, peer in kernel["peers"].items()
        ]
        rows.append([*cells, f"{share:.0%} of {limit}", ", ".join(peers)])
    headings = [("kernel", False), ("us", True), ("10 % .. 90 %", True), ("of the ceiling", True)]
    print_table([*headings, ("faster than", False)], rows)
    printer.print(
        f"the device copies {ceilings['copy_bytes_per_second'] / 1e9:,.0f} GB/s and multiplies"
        f" {ceilings['matmul_flops'] / 1e12:,.0f} TFLOP/s, measured in this run",
        soft_wrap=True,
    )
