"""On a machine with several memory nodes the executor computes where its memory is."""

from __future__ import annotations

import json
import os
from pathlib import Path
import subprocess
import sys

import pytest

from execsvc.numa import choose_node, parse_cpus, read_nodes

_TWO = {0: frozenset({0, 1, 2, 3}), 1: frozenset({4, 5, 6, 7})}
_BOUND = """
import json, os, sys, threading
from pathlib import Path
from execsvc.numa import stay_on_one_node
go, ended = threading.Event(), threading.Event()
older = threading.Thread(target=lambda: (go.wait(30), found.append(sorted(os.sched_getaffinity(0)))))
found = []
older.start()
stay_on_one_node(None, Path(sys.argv[1]))
go.set()
older.join()
print(json.dumps([sorted(os.sched_getaffinity(0)), *found]))
"""


def test_lists_of_cores_are_read_as_the_kernel_writes_them() -> None:
    """A core that is missed would stay idle, one too many would read its neighbour's memory."""
    assert parse_cpus("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert parse_cpus("\n") == frozenset()


@pytest.mark.parametrize(
    ("allowed", "threads", "node"),
    [
        (range(8), None, 0),
        (range(3, 8), None, 1),
        (range(8), 4, 0),
        (range(8), 5, None),
        (range(4), None, None),
    ],
)
def test_the_node_with_most_cores_is_taken(allowed: range, threads: int | None, node: int | None) -> None:
    """Half of all reads would cross the machine; or threads that a user asked for would share cores."""
    assert choose_node(_TWO, frozenset(allowed), threads) == node


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_all_threads_stay_on_the_node(tmp_path: Path) -> None:
    """A thread that was there before would allocate the cache on the other node."""
    cores = sorted(os.sched_getaffinity(0))
    for node, cpus in enumerate((cores[:1], cores[1:])):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(",".join(map(str, cpus)))
    assert read_nodes(tmp_path) == {0: frozenset(cores[:1]), 1: frozenset(cores[1:])}
    run = subprocess.run(
        [sys.executable, "-c", _BOUND, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    expected = cores[1:] if len(cores) > 2 else cores[:1]
    assert json.loads(run.stdout.splitlines()[-1]) == [expected, expected]
    assert "numa_node_chosen" in run.stdout
