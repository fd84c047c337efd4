"""Everything that is to be known of a GPU, in one call of less than eight minutes.

    python benchmarks/gpu.py [--wheels DIR] [--out FILE] [--seconds N] [--peer PYTHON]

Says what is there, runs the kernel tests marked `gpu`, measures the kernels beside their peers and an engine with the
8B shape beside transformers, and prints a short table last. The document goes to a file: device, versions, medians,
spread, and shares of ceilings measured in the same run. Each part runs in a process of its own with a limit; one that
fails or takes too long is named, and the others go on. Without a CUDA device it says so and ends with status 2.

A machine without network gets what it lacks from a directory of wheels (`--wheels`), installed beside this run alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import dataclasses
import datetime as dt
import importlib.util
import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
SHAPE: Final = ROOT / "benchmarks" / "shapes" / "llama-8b.json"
NEEDED: Final = {
    "torch": "torch",
    "triton": "triton",
    "numpy": "numpy",
    "structlog": "structlog",
    "grpc": "grpcio",
    "google.protobuf": "protobuf",
    "grpc_status": "grpcio-status",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "gguf": "gguf",
    "pytest": "pytest",
    "pytest_asyncio": "pytest-asyncio",
}
"""Modules that the parts import: the distributions that bring them."""
SECONDS: Final = 460.0
NO_DEVICE: Final = 2
_SMI: Final = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
_TAIL: Final = 20


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One process of the run."""

    name: str
    command: list[str]
    limit: float
    """Seconds that it may take at most."""
    reads_json: bool = True
    """Whether the last line that it prints is a document."""
    environ: dict[str, str] = dataclasses.field(default_factory=dict)


def missing() -> list[str]:
    """Returns the modules that the parts need and that cannot be imported."""
    found = []
    for name in NEEDED:
        try:
            there = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:
            there = False
        if not there:
            found.append(name)
    return found


def install(wheels: Path, target: Path, modules: list[str]) -> None:
    """Installs modules from a directory of wheels into `target`; raises CalledProcessError if one is not there."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", str(wheels)]
    subprocess.run([*command, "--target", str(target), *(NEEDED[name] for name in modules)], check=True)  # noqa: S603


def run_part(part: Part, seconds_left: float) -> dict[str, Any]:
    """Runs a part; returns its document or the end of what it printed, its status and its seconds."""
    limit = min(part.limit, seconds_left)
    if limit <= 0:
        return {"failed": "no time was left"}
    started = time.monotonic()
    sys.stderr.write(f"{part.name} (at most {limit:.0f} s)\n")
    try:
        done = subprocess.run(  # noqa: S603 - our own modules
            part.command, cwd=ROOT, env=os.environ | part.environ, capture_output=True, text=True, timeout=limit,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {limit:.0f} s", "seconds": limit}
    found: dict[str, Any] = {"seconds": round(time.monotonic() - started, 1), "status": done.returncode}
    output = done.stdout.strip().splitlines()
    if part.reads_json:
        try:
            document = json.loads(output[-1])
        except (ValueError, IndexError):
            found["failed"] = "printed no document"
        else:
            error = document.get("error")
            return found | ({"document": document} if error is None else {"failed": error["message"]})
    elif done.returncode:
        found["failed"] = f"ended with status {done.returncode}"
    return found | {"tail": (output + done.stderr.strip().splitlines())[-_TAIL:]}


def parts(peer: str) -> list[Part]:
    """Returns the parts, in order."""
    python = sys.executable
    tests = [python, "-m", "pytest", "tests/kernels", "-m", "gpu", "-q", "-x", "-p", "no:cacheprovider"]
    engine = [python, "-m", "execsvc.bench", "--model", str(SHAPE), "--load-format", "dummy", "--device", "cuda"]
    engine += ["--dtype", "bfloat16", "--batches", "1,16,64,256", "--contexts", "512,2048,8192"]
    engine += ["--prompts", "2048,8192", "--steps", "32"]
    found = [Part("kernel tests", tests, 150.0, reads_json=False, environ={"QUIRE_KERNELS_ON": "cuda"})]
    if importlib.util.find_spec("kernels.bench") is not None:
        found.append(Part("kernels", [python, "-m", "kernels.bench", "--json"], 150.0))
    return [*found, Part("engine", [*engine, *(["--peer", peer] if peer else [])], 240.0)]


def environment() -> dict[str, Any]:
    """Returns the device and the versions."""
    import torch  # noqa: PLC0415 - it may have to be installed first
    import triton  # noqa: PLC0415 - the same

    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    }
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={_SMI}", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)  # noqa: S603
        found["nvidia_smi"] = dict(zip(_SMI.split(","), answer.stdout.splitlines()[0].split(", "), strict=False))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S607
    found["commit"] = commit.stdout.strip()
    return found


def kernel_rows(document: dict[str, Any]) -> list[str]:
    """Returns a line for each kernel: its time, its shares of the ceilings, its ratios to peers."""
    lines = []
    for row in document.get("kernels", ()):
        shares = [f"{row[name]:.0%} of {name[9:]}" for name in ("share_of_copy", "share_of_matmul") if name in row]
        peers = row.get("peers", {}).items()
        ratios = [f"{found['times_faster']:.2f}x as fast as {name}" for name, found in peers if "failed" not in found]
        lines.append(f"{row['name']:<44}{row['us']['median']:>10.1f} us  {', '.join([*shares, *ratios])}")
    return ["", *lines] if lines else []


def table(document: dict[str, Any]) -> str:
    """Returns the short table that is printed last."""
    lines = [f"{document['environment']['device']}, torch {document['environment']['torch']}"]
    for name, part in document["parts"].items():
        state = part.get("failed") or f"{part['seconds']:.0f} s"
        last = part["tail"][-1] if part.get("tail") else ""
        lines.append(f"{name:<14}{state}{'  ' + last if last else ''}")
    lines += kernel_rows(document["parts"].get("kernels", {}).get("document", {}))
    engine = document["parts"].get("engine", {}).get("document", {})
    peers = {(row["batch"], row["context"]): row for row in engine.get("peer", {}).get("decode", ())}
    if "ceilings" in engine:
        ceilings = engine["ceilings"]
        copy, multiply = ceilings["copy_bytes_per_second"] / 1e12, ceilings["matmul_flops"] / 1e12
        lines += ["", f"ceilings: copy {copy:.2f} TB/s, matmul {multiply:.0f} TFLOP/s", ""]
        budget = engine["budget"]
        for name in ("available", "weights", "activations", "graphs", "kv_cache"):
            lines.append(f"{name:<14}{budget[name] / 2**30:8.2f} GiB")
        lines += ["", f"{'decode':<14}{'step us':>10}{'tokens/s':>12}{'of copy':>9}{'host us':>9}{'peer':>10}"]
    for row in engine.get("decode", ()):
        name = f"{row['batch']} x {row['context']}"
        if "skipped" in row:
            lines.append(f"{name:<14}{row['skipped']}")
            continue
        peer = peers.get((row["batch"], row["context"]), {}).get("tokens_per_second")
        lines.append(
            f"{name:<14}{row['step_us']['median']:>10.0f}{row['tokens_per_second']:>12.0f}"
            f"{row['share_of_copy_bandwidth']:>9.0%}{row['host_us']['median']:>9.0f}"
            f"{'' if peer is None else format(peer, '.0f'):>10}"
        )
    for row in engine.get("prefill", ()):
        share = (
            "" if "skipped" in row else f"{row['tokens_per_second']:.0f} tokens/s, {row['share_of_matmul_rate']:.0%}"
        )
        lines.append(f"prompt {row['length']:<7}{row.get('skipped', share)}")
    return "\n".join(lines)


def has_device() -> bool:
    """Whether torch is there and sees a CUDA device."""
    try:
        import torch  # noqa: PLC0415 - it may not be there
    except ImportError:
        return False
    return torch.cuda.is_available()


def main(argv: Sequence[str]) -> int:
    """Runs everything; returns 0, 1 if a part failed, 2 if there is no device or something is missing."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="directory of wheels for what is missing here")
    parser.add_argument("--out", type=Path, help="file for the document; else benchmarks/results/gpu-DEVICE-DATE.json")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything together")
    parser.add_argument("--peer", default="auto", help="a Python with transformers; empty for none")
    options = parser.parse_args(argv)
    if not has_device():
        sys.stderr.write(
            "gpu.py: no CUDA device: nothing was measured. Run it where torch.cuda.is_available() is true.\n"
        )
        return NO_DEVICE
    with tempfile.TemporaryDirectory() as directory:
        if (lacking := missing()) and options.wheels:
            install(options.wheels, Path(directory), lacking)
            sys.path.insert(0, directory)
            lacking = missing()
        if lacking:
            sys.stderr.write(f"gpu.py: missing: {', '.join(lacking)}; give a directory of wheels with --wheels\n")
            return NO_DEVICE
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), directory, os.environ.get("PYTHONPATH", "")])
        document: dict[str, Any] = {"environment": environment(), "parts": {}}
        for part in parts(options.peer):
            document["parts"][part.name] = run_part(part, options.seconds - (time.monotonic() - started))
    document["seconds"] = round(time.monotonic() - started, 1)
    device = re.sub(r"\W+", "-", document["environment"]["device"]).strip("-").lower()
    default = ROOT / "benchmarks" / "results" / f"gpu-{device}-{document['environment']['date'][:10]}.json"
    out = options.out or default
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(table(document))
    print(f"\n{out}, {document['seconds']:.0f} s")
    return int(any("failed" in part for part in document["parts"].values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
