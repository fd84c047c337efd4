"""`python -m execsvc.bench`: measures, and prints one JSON document; progress goes to stderr."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import importlib.util
import json
from pathlib import Path
import subprocess
import sys
from typing import Any

from execsvc.bench.compare import compare
from execsvc.bench.report import Request, measure
from execsvc.config import ExecsvcConfig
from quire.documents import print_document
from quire.errors import ConfigError
from quire.peers.process import choices

_PEER_SECONDS = 600


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _numbers(text: str) -> tuple[int, ...]:
    """Returns the numbers of "1,16,64"; argparse names the flag if there are none."""
    return tuple(int(part) for part in text.split(",") if part)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m execsvc.bench", description=__doc__)
    for flag, default, text in (
        ("--model", "smollm2", "GGUF file, directory, or config.json with --load-format dummy"),
        ("--load-format", "auto", "auto or dummy"),
        ("--device", "auto", "auto, cpu or cuda"),
        ("--dtype", "auto", "element type to compute in"),
        ("--quantization", "none", "bits of the weights"),
        ("--kv-cache-dtype", "auto", "element type of the KV cache"),
        ("--attention-backend", "auto", "auto, torch or triton"),
        ("--kv-cache-bytes", None, "size of the KV cache"),
    ):
        parser.add_argument(flag, default=default, help=text)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9, help="share of the device's memory")
    parser.add_argument("--num-threads", type=int, default=None, help="CPU threads of the model")
    parser.add_argument("--enforce-eager", action="store_true", help="no captured graphs")
    parser.add_argument("--batches", type=_numbers, default=(1, 16, 64, 256), help="sequences that decode")
    parser.add_argument("--contexts", type=_numbers, default=(512, 2048, 8192), help="tokens that they have")
    parser.add_argument("--prompts", type=_numbers, default=(2048, 8192), help="lengths of prompts")
    parser.add_argument("--steps", type=int, default=32, help="decode steps that are timed")
    parser.add_argument(
        "--peer", default="", help="a Python with transformers, or auto for this one; or NAME=PYTHON,.. to compare with"
    )
    parser.add_argument("--peer-model", default="", help="models of named peers: NAME=PATH,..")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each engine in a comparison")
    return parser


def _request(options: argparse.Namespace) -> Request:
    """Returns what is asked for; raises ConfigError if a list is empty or a number too small."""
    for name in ("batches", "contexts", "prompts"):
        values = getattr(options, name)
        if not values or min(values) < 1:
            raise ConfigError(f"--{name}: {values} found, numbers from 1 are expected", field=name)
    for name in ("steps", "rounds"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name}: {getattr(options, name)} found, at least 1 is expected", field=name)
    longest = max(max(options.contexts) + 2 * options.steps + 8, max(options.prompts) + 8)
    config = ExecsvcConfig(
        model=options.model,
        load_format=options.load_format,
        device=options.device,
        dtype=options.dtype,
        kv_cache_dtype=options.kv_cache_dtype,
        quantization=options.quantization,
        attention_backend=options.attention_backend,
        kv_cache_bytes=options.kv_cache_bytes,
        gpu_memory_utilization=options.gpu_memory_utilization,
        num_threads=options.num_threads,
        enforce_eager=options.enforce_eager,
        max_num_seqs=max(options.batches),
        max_model_len=longest,
    )
    return Request(config, options.batches, options.contexts, options.prompts, options.steps)


def _peer(options: argparse.Namespace, document: dict[str, Any]) -> dict[str, Any]:
    """Returns what transformers' continuous batching does with the same shape on the same device."""
    python = options.peer
    if python == "auto":
        if importlib.util.find_spec("transformers") is None:
            return {"skipped": "transformers is not importable here"}
        python = sys.executable
    config = Path(options.model)
    config = config / "config.json" if config.is_dir() else config
    if config.suffix != ".json" or not config.is_file():
        return {"skipped": "the peer needs a config.json: give --model one"}
    device = "cpu" if document["environment"]["device"] == "cpu" else "cuda"
    script = str(Path(__file__).with_name("transformers_peer.py"))
    batches = ",".join(map(str, options.batches))
    command = [python, script, str(config), device, document["dtype"], batches, str(min(options.contexts))]
    _say(f"measuring transformers in {python}")
    try:
        done = subprocess.run(  # noqa: S603 - the interpreter that the user named
            command, capture_output=True, text=True, timeout=_PEER_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"skipped": f"the peer did not answer: {error}"}
    lines = done.stdout.strip().splitlines()
    try:
        found: dict[str, Any] = json.loads(lines[-1])
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        return {"skipped": f"the peer ended with status {done.returncode}: {last}"}
    return found


def main(argv: Sequence[str]) -> int:
    """Runs the command. Errors are a document as well: {"error": {reason, message, field}}, exit status 1."""
    options = _parser().parse_args(argv)

    def make() -> dict[str, Any]:
        if "=" in options.peer:
            peers = choices(options.peer, options.peer_model)
            return compare(_request(options), peers, options.rounds, _say)
        document = measure(_request(options), _say)
        if options.peer:
            document["peer"] = _peer(options, document)
        return document

    return print_document(make, "bench")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
