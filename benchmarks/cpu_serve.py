"""The whole system on a CPU, client and services on the same cores, beside its executor alone and peers.

    python benchmarks/cpu_serve.py [--threads N] [--rounds R] [--executor-threads M] [--json FILE] \
        [--workload COUNTxPROMPTxOUTPUT ..] \
        [--peer vllm=PYTHON,llamacpp=PYTHON --peer-model vllm=DIR,llamacpp=GGUF]

Output tokens a second of requests that are sent at once, medians of rounds in which everyone has a turn. "executor
alone" is our engine given the same work without services; "times" of it is the share that the system keeps. The last
line is the processor time that each service took for an output token.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
import contextlib
import datetime as dt
import json
import os
from pathlib import Path
import re
import signal
import subprocess
import sys
import tempfile
import time

from quire.cli.bench_serve import beside_peers, show_beside_peers
from quire.peers.load import Requests
from quire.peers.process import ALONE, PeerChoice, choices

WORKLOADS = [Requests(1, 16, 128), Requests(8, 128, 128), Requests(32, 128, 128), Requests(64, 256, 64)]
START_SECONDS, STOP_SECONDS = 180.0, 60.0
SERVICES = ("memsvc", "execsvc", "gateway")


@contextlib.contextmanager
def system(model: str, threads: int) -> Iterator[tuple[str, int]]:
    """Serves a model; yields the address of its gateway and the process of `quire serve`."""
    command = [sys.executable, "-m", "quire.cli.main", "serve", "--model", model, "--port", "0", "--memsvc-port", "0"]
    command += ["--execsvc-port", "0", "--no-enable-prefix-caching", "--num-threads", str(threads)]
    command += ["--max-num-seqs", "64", "--max-model-len", "2048"]
    with tempfile.TemporaryDirectory() as folder, Path(folder, "out").open("w+b") as out:
        command += ["--log-dir", folder]
        with subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT) as process:  # noqa: S603 - our own program
            try:
                yield wait_for_address(Path(folder, "out"), process), process.pid
            finally:
                process.terminate()
                process.wait(STOP_SECONDS)


def wait_for_address(path: Path, process: subprocess.Popen[bytes]) -> str:
    """Returns where the gateway listens, as the banner says."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        found = re.search(r"(127\.0\.0\.1:\d+)", path.read_text(errors="replace"))
        if found:
            return found.group(1)
        time.sleep(0.2)
    raise SystemExit(f"the system does not serve: {path.read_text(errors='replace')[-1000:]}")


def workload(text: str) -> Requests:
    """Returns the workload "requests x tokens of a prompt x tokens to generate"; raises ValueError."""
    count, prompt, output = (int(part) for part in text.split("x"))
    return Requests(count, prompt, output)


def processor_seconds(parent: int) -> dict[str, float]:
    """Returns the processor time of each service that `parent` started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            names = [name for name in SERVICES if name in words[:4]]
            if int(fields[1]) == parent and names:
                found[names[0]] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of peers, and the executor")
    parser.add_argument("--executor-threads", type=int, help="of the executor in the system, if others")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workload", type=workload, action="append", help="for example 8x128x128; these, not all")
    parser.add_argument("--peer", default="")
    parser.add_argument("--peer-model", default="")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    peers = [PeerChoice(ALONE, sys.executable, options.model)]
    peers += choices(options.peer, options.peer_model) if options.peer else []
    inside = options.executor_threads or options.threads
    workloads = options.workload or WORKLOADS
    # Who ends this ends what it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with system(options.model, inside) as (address, process):
        before = processor_seconds(process)
        document = beside_peers(address, workloads, peers, options.threads, options.rounds)
        after = processor_seconds(process)
    made = sum(requests.count * requests.output for requests in workloads) * (options.rounds + 1)
    document |= {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "model": options.model,
        "executor_threads_in_the_system": inside,
        "load_average": os.getloadavg()[0],
        "processor_us_per_token": {name: round((after[name] - before[name]) / made * 1e6, 1) for name in after},
    }
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    show_beside_peers(document, as_json=False)
    spent = ", ".join(f"{name} {value:,.0f}" for name, value in document["processor_us_per_token"].items())
    sys.stdout.write(f"{inside} threads in the system; processor time of an output token in us: {spent}\n")


if __name__ == "__main__":
    main()
