"""Threads and memory of one node, on machines whose memory is not equally near to all cores (NUMA).

Linux gives a page to the node of the thread that touches it first. So it is enough to keep all threads of the process
on one node before weights and cache are touched.
"""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import os
from pathlib import Path
from typing import Final

import structlog

from execsvc import events

log = structlog.get_logger(__name__)

NODES: Final = Path("/sys/devices/system/node")
_TASKS: Final = Path("/proc/self/task")


def parse_cpus(text: str) -> frozenset[int]:
    """Returns the cores of a list as the kernel writes it: "0-3,8"."""
    found: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def read_nodes(folder: Path = NODES) -> dict[int, frozenset[int]]:
    """Returns the cores of each node that has any; empty where the system does not tell."""
    nodes = {int(path.parent.name[4:]): parse_cpus(path.read_text()) for path in folder.glob("node[0-9]*/cpulist")}
    return {node: cpus for node, cpus in sorted(nodes.items()) if cpus}


def choose_node(nodes: Mapping[int, frozenset[int]], allowed: frozenset[int], threads: int | None) -> int | None:
    """Returns the node to stay on, or None if there is no choice to make or none suffices.

    Args:
        nodes: cores of each.
        allowed: cores that the process may use.
        threads: that were asked for; None for as many as suit.
    """
    usable = {node: len(cpus & allowed) for node, cpus in nodes.items() if cpus & allowed}
    if len(usable) < 2:  # noqa: PLR2004 - one node is no choice
        return None
    node = max(usable, key=lambda candidate: (usable[candidate], -candidate))
    return node if threads is None or threads <= usable[node] else None


def stay_on_one_node(threads: int | None, folder: Path = NODES) -> None:
    """Keeps every thread of the process, and those that they start, on the cores of one node, and logs which.

    On a machine with one node, or where the process was given cores of one alone, nothing is done or said. If more
    threads are asked for than a node has cores, they may run everywhere, and that is logged.

    Args:
        threads: that were asked for; None for as many as suit.
        folder: where the system describes its nodes.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    nodes, allowed = read_nodes(folder), frozenset(os.sched_getaffinity(0))
    if sum(bool(cpus & allowed) for cpus in nodes.values()) < 2:  # noqa: PLR2004 - one node is no choice
        return
    node = choose_node(nodes, allowed, threads)
    if node is None:
        log.warning(events.NUMA_NODE_CHOSEN, node=None, node_count=len(nodes), num_threads=threads)
        return
    cpus = nodes[node] & allowed
    for task in _TASKS.iterdir():
        # A thread that has just ended needs no core.
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), cpus)
    log.info(events.NUMA_NODE_CHOSEN, node=node, node_count=len(nodes), cpu_count=len(cpus))
