"""`python -m gateway.bench`: measures, and prints one JSON document; progress goes to stderr."""

from __future__ import annotations

import argparse
import asyncio
import sys
from typing import Any

from gateway.bench import runner, scheduler_runner
from memsvc.bench.peer import SCRIPT, Peer
from quire.documents import print_document


async def _measure(options: argparse.Namespace) -> dict[str, Any]:
    script = scheduler_runner.PEER_SCRIPT if options.what == "scheduler" else SCRIPT
    peer = Peer(options.peer, options.block_size, script) if options.peer else None
    try:
        if peer is not None:
            _say(f"importing vllm in {options.peer}")
            await peer.start()
        if options.what == "scheduler":
            return await scheduler_runner.run(options.block_size, options.repeat, peer, _say)
        return (await runner.run(options.block_size, options.repeat, peer, _say)).document()
    finally:
        if peer is not None:
            await peer.close()


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def main() -> int:
    """Runs the command. Errors are a document as well: {"error": {reason, message, field}}, exit status 1."""
    parser = argparse.ArgumentParser(prog="python -m gateway.bench", description=__doc__)
    parser.add_argument("what", choices=("memory", "scheduler"), nargs="?", default="memory", help="what to measure")
    parser.add_argument("--block-size", type=int, choices=(16, 32, 64), default=16, help="tokens in a block")
    parser.add_argument("--repeat", type=int, default=5, help="rounds")
    parser.add_argument("--peer", default="", help="a Python in which vllm can be imported")
    options = parser.parse_args()
    return print_document(lambda: asyncio.run(_measure(options)), "bench")


if __name__ == "__main__":
    sys.exit(main())
