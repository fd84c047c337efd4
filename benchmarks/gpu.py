"""Everything that is to be known of a GPU, in one call of less than eight minutes.

    python benchmarks/gpu.py [--wheels DIR] [--out FILE] [--seconds N] [--peer PYTHON] [--only PART,..]
    python benchmarks/gpu.py --collect DIR [--for-python 3.12]        where there is a network, before

Says what is there, measures kernels beside their peers and an engine with the 8B shape beside transformers, runs the
kernel tests marked `gpu`, some of them under compute-sanitizer where it is installed, and prints a short table last.
The document goes to a file, anew after each part: device, versions, medians, spread, and shares of ceilings measured in
the same run. Each part runs in a process of its own with a limit; one that fails, takes too long or lacks a package is
named, and the others go on. Without a CUDA device it says so and ends with status 2.

A machine without network gets what it lacks from a directory of wheels (`--wheels`), installed beside this run alone;
`--collect` fills one.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import datetime as dt
import importlib.util
import json
import os
from pathlib import Path
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
SHAPE: Final = ROOT / "benchmarks" / "shapes" / "llama-8b.json"
KERNELS: Final = {"torch": "torch", "triton": "triton", "numpy": "numpy"}
"""Modules that kernels import: the distributions that bring them."""
ENGINE: Final = KERNELS | {
    "structlog": "structlog",
    "grpc": "grpcio",
    "google.protobuf": "protobuf",
    "google.rpc": "googleapis-common-protos",
    "grpc_status": "grpcio-status",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
    "llguidance": "llguidance",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "gguf": "gguf",
    "yaml": "pyyaml",
    "tqdm": "tqdm",
    "jinja2": "jinja2",
    "markupsafe": "markupsafe",
}
"""The same of the executor."""
TESTS: Final = KERNELS | {
    "pytest": "pytest",
    "pytest_asyncio": "pytest-asyncio",
    "iniconfig": "iniconfig",
    "pluggy": "pluggy",
    "packaging": "packaging",
    "pygments": "pygments",
}
"""The same of most kernel tests; some run an engine."""
NEEDED: Final = ENGINE | TESTS
_PRESENT: Final = {"torch", "triton", "numpy"}
"""Distributions that a GPU machine has; their wheels would be large, and others than the device's."""
SECONDS: Final = 460.0
NO_DEVICE: Final = 2
_SMI: Final = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
_TAIL: Final = 20
_NO_TESTS: Final = 5
"""Pytest's status where a file has no test that is asked for."""
_SANITIZED: Final = "with_chance_choosing_everything or shared_prefix_is or turn_on_a_long"
"""Tests that compute-sanitizer watches: each attention kernel once, with every option."""


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
    needs: dict[str, str] = dataclasses.field(default_factory=dict)
    """Modules without which it is not started."""


def missing(modules: Iterable[str] = NEEDED) -> list[str]:
    """Returns those of `modules` that cannot be imported."""
    found = []
    for name in modules:
        try:
            there = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:
            there = False
        if not there:
            found.append(name)
    return found


def install(wheels: Path, target: Path, modules: list[str]) -> list[str]:
    """Installs modules from a directory of wheels into `target`; returns what was not, and why.

    Nothing comes with them that is not in the list: it would go before what the machine has, numpy for one. All come in
    one go, because some share a package (`google`) that pip does not add to later.
    """
    present = {path.name.split("-")[0].lower().replace("_", "-") for path in wheels.glob("*.whl")}
    names = sorted({NEEDED[name] for name in modules})
    failures = [f"{name}: no wheel in {wheels}" for name in names if name not in present]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    command += ["--find-links", str(wheels), "--target", str(target), *(name for name in names if name in present)]
    if len(failures) < len(names):
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own list
        if done.returncode:
            failures.append((done.stderr.strip().splitlines() or ["pip said nothing"])[-1])
    return failures


def collect(target: Path, python: str) -> int:
    """Downloads the wheels that a GPU machine with this version of Python may lack; returns pip's status."""
    names = sorted(set(NEEDED.values()) - _PRESENT)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(target), "--only-binary", ":all:"]
    command += ["--python-version", python, "--implementation", "cp", "--platform", "manylinux_2_28_x86_64"]
    command += ["--platform", "manylinux2014_x86_64", "--platform", "manylinux_2_17_x86_64"]
    return subprocess.run([*command, *names], check=False).returncode  # noqa: S603 - our own list


def run_part(part: Part, seconds_left: float) -> dict[str, Any]:
    """Runs a part; returns its document or the end of what it printed, its status and its seconds."""
    limit = min(part.limit, seconds_left)
    if lacking := missing(part.needs):
        return {"failed": f"missing: {', '.join(lacking)}; give a directory of wheels with --wheels"}
    if limit <= 0:
        return {"failed": "no time was left"}
    started = time.monotonic()
    sys.stderr.write(f"{part.name} (at most {limit:.0f} s)\n")
    running = subprocess.Popen(  # noqa: S603 - our own modules
        part.command, cwd=ROOT, env=os.environ | part.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        stdout, stderr = running.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        # With what it started: it would go on beside the next part.
        os.killpg(running.pid, signal.SIGKILL)
        stdout, stderr = running.communicate()
        lines = [*stdout.strip().splitlines(), *stderr.strip().splitlines()]
        return {"failed": f"took longer than {limit:.0f} s", "seconds": limit, "tail": lines[-_TAIL:]}
    found: dict[str, Any] = {"seconds": round(time.monotonic() - started, 1), "status": running.returncode}
    output = stdout.strip().splitlines()
    if part.reads_json:
        try:
            document = json.loads(output[-1])
        except (ValueError, IndexError):
            found["failed"] = "printed no document"
        else:
            error = document.get("error")
            return found | {"document": document} | ({} if error is None else {"failed": error["message"]})
    elif running.returncode:
        found["failed"] = f"ended with status {running.returncode}"
    return found | {"tail": (output + stderr.strip().splitlines())[-_TAIL:]}


def parts(peer: str) -> list[Part]:
    """Returns the parts, in order."""
    python = sys.executable
    engine = [python, "-m", "execsvc.bench", "--model", str(SHAPE), "--load-format", "dummy", "--device", "cuda"]
    engine += ["--dtype", "bfloat16", "--batches", "1,16,64,256", "--contexts", "512,2048,8192"]
    engine += ["--prompts", "2048,8192", "--steps", "32"]
    on_device = {"QUIRE_KERNELS_ON": "cuda", "TRITON_DEFAULT_FP_FUSION": "1"}
    found = [
        Part("kernels", [python, "-m", "kernels.bench", "--json"], 120.0, needs=KERNELS),
        Part("engine", [*engine, *(["--peer", peer] if peer else [])], 180.0, needs=ENGINE),
        Part("kernel tests", [python, __file__, "--tests"], 140.0, environ=on_device, needs=TESTS),
    ]
    if (sanitizer := _sanitizer()) is not None:
        checked = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", "--launch-timeout", "60"]
        checked += [*_pytest(), "-k", _SANITIZED, "tests/kernels"]
        environ = on_device | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        found.append(Part("sanitizer", checked, 120.0, reads_json=False, environ=environ, needs=TESTS))
    return found


def _sanitizer() -> str | None:
    """Returns compute-sanitizer, if it is installed."""
    found = shutil.which("compute-sanitizer")
    beside = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"]
    return found or next((str(path) for path in beside if path.is_file()), None)


def _pytest() -> list[str]:
    """Returns the command that runs tests on the device: a file that cannot be imported must not stop the others."""
    return [
        sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors",
        "--maxfail", "20",
    ]  # fmt: skip


def run_tests() -> int:
    """Runs the files of kernel tests side by side, because compiling takes most of the time; prints one document."""
    files = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
    summaries: dict[str, str] = {}
    failures: list[str] = []

    def run(path: Path) -> None:
        done = subprocess.run(  # noqa: S603 - our own tests
            [*_pytest(), str(path)], cwd=ROOT, capture_output=True, text=True, check=False
        )
        lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
        summaries[path.name] = lines[-1]
        named = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        if done.returncode not in {0, _NO_TESTS} and not named:
            named = [f"{path.name}: ended with status {done.returncode}: {lines[-1]}"]
        failures.extend(named)

    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:
        list(pool.map(run, files))
    document: dict[str, Any] = {"files": dict(sorted(summaries.items())), "failures": sorted(failures)}
    if failures:
        document["error"] = {"message": f"{len(failures)} failed: {min(failures)}"}
    print(json.dumps(document))
    return int(bool(failures))


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
        answer = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        row = (answer.stdout.splitlines() or [""])[0]
        found["nvidia_smi"] = dict(zip(_SMI.split(","), row.split(", "), strict=False))
    if shutil.which("git"):
        command = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
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
        state = part.get("failed") or part.get("skipped") or f"{part['seconds']:.0f} s"
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
    parser.add_argument("--only", default="", help="parts to run, by name, with commas; all by default")
    parser.add_argument("--collect", type=Path, help="download wheels into a directory, and do nothing else")
    parser.add_argument("--for-python", default="3.12", help="version of Python of the wheels to collect")
    parser.add_argument("--tests", action="store_true", help="run the kernel tests alone, and print their document")
    options = parser.parse_args(argv)
    if options.collect:
        return collect(options.collect, options.for_python)
    if options.tests:
        return run_tests()
    if not has_device():
        sys.stderr.write(
            "gpu.py: no CUDA device: nothing was measured. Run it where torch.cuda.is_available() is true.\n"
        )
        return NO_DEVICE
    document: dict[str, Any] = {"environment": environment(), "parts": {}}
    device = re.sub(r"\W+", "-", document["environment"]["device"]).strip("-").lower()
    default = ROOT / "benchmarks" / "results" / f"gpu-{device}-{document['environment']['date'][:10]}.json"
    out = options.out or default
    out.parent.mkdir(parents=True, exist_ok=True)
    wanted = [name.strip() for name in options.only.split(",") if name.strip()]
    with tempfile.TemporaryDirectory() as directory:
        if (lacking := missing()) and options.wheels:
            document["not_installed"] = install(options.wheels, Path(directory), lacking)
            sys.path.insert(0, directory)
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), directory, os.environ.get("PYTHONPATH", "")])
        for part in parts(options.peer):
            if wanted and part.name not in wanted:
                continue
            document["parts"][part.name] = run_part(part, options.seconds - (time.monotonic() - started))
            document["seconds"] = round(time.monotonic() - started, 1)
            out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if _sanitizer() is None:
        document["parts"]["sanitizer"] = {"skipped": "compute-sanitizer is not installed", "seconds": 0.0}
    document["seconds"] = round(time.monotonic() - started, 1)
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(table(document))
    print(f"\n{out}, {document['seconds']:.0f} s")
    return int(any("failed" in part for part in document["parts"].values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
