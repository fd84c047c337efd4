"""Prints ours beside peers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from quire.cli.output import print_table


def describe_peers(peers: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the threads and versions of peers, for a line."""
    return ", ".join(f"{name}: {about['threads']} ({about['version']})" for name, about in peers.items())


def print_rates(rows: Iterable[Mapping[str, Any]], peers: Iterable[str], unit: str = "tokens/s") -> None:
    """Prints a table of rates: ours, and for each peer its own and how many times as many ours are."""
    names = list(peers)
    headings = [(unit, False), ("quire", True)]
    for name in names:
        headings += [(name, True), ("times", True)]
    lines = []
    for row in rows:
        cells = [row["case"], f"{row['tokens_per_second']:,.0f}"]
        for name in names:
            cells += [f"{row['peers'][name]:,.0f}", f"{row['ratios'][name]:.2f}"]
        lines.append(cells)
    print_table(headings, lines)
